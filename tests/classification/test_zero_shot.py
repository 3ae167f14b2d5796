"""scripts/zero_shot.py with any model and any labelled images."""

import shutil

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import models

from tests.classification.conftest import paint
from tests.conftest import read_json
from tests.models.small import small_clip, small_preprocess
from tests.torchrun import Torchrun

CPU = ("--device", "cpu", "--num_workers", 0)


@pytest.fixture
def own(checkpoint, tmp_path):
    """A checkpoint of ours in its own folder."""
    (tmp_path / "run").mkdir()
    return shutil.copy(checkpoint, tmp_path / "run" / "best.pt")


@pytest.fixture
def weights(tmp_path):
    """Weights of another system."""
    torch.save({"state_dict": small_clip(seed=3).state_dict()}, tmp_path / "theirs.pt")
    return tmp_path / "theirs.pt"


def numbers(results, *without):
    return {name: value for name, value in results.items() if name not in ("seconds", *without)}


def test_checkpoint_and_folder_need_no_other_option(script, own, colours):
    code, out, err = script("zero_shot", "--resume", own, "--data", colours, "--device", "cpu")
    assert code == 0, err
    folder = own.parent / "zero_shot_colours"
    results = read_json(folder / "results.json")
    assert list(results) == [
        *("model", "weights", "dataset", "data_root", "class_names", "precision", "template_set", "templates"),
        *("images", "classes", "top1", "mean_per_class", "seconds", "per_class", "version"),
    ]
    assert (results["weights"], results["template_set"], len(results["templates"])) == (str(own), "imagenet", 80)
    text = (folder / "results.txt").read_text(encoding="utf-8")
    for each in results["per_class"]:
        line = next(line for line in text.splitlines() if line.startswith(each["class"]))
        assert f"{each['top1']:.2f}" in line and line in out
    assert f"top1 {results['top1']:.2f}" in out and str(folder / "results.json") in out
    assert (folder / "options.json").is_file() and (folder / "log.txt").is_file()


def test_results_equal_clips_reference_recipe(script, weights, captioned, tmp_path):
    """Compared with open_clip's own code over all images and classes; no two scores are equal."""
    names = ["dog", "great white shark", "crane", "bus", "red apple", "teddy bear", "school"]
    for number, name in enumerate(names):
        for image in range(4):
            source = captioned / f"{(4 * number + image) % 26}.jpg"
            target = tmp_path / "data" / name.replace(" ", "_") / f"{image}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(source).rotate(90 * (number % 4)).save(target)
    model = ("--vision_model", captioned / "small.json", "--pretrained", weights)
    code, _, err = script("zero_shot", *model, "--data", "data", "--output", "out", "--templates", "cifar", *CPU)
    assert code == 0, err
    results = read_json(tmp_path / "out/results.json")

    clip, size = small_clip(seed=3), small_preprocess()
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**size), is_train=False)
    classifier = open_clip.build_zero_shot_classifier(
        clip, open_clip.SimpleTokenizer(context_length=clip.context_length), sorted(names), results["templates"]
    )
    hits = []
    for label, name in enumerate(sorted(names)):
        folder = tmp_path / "data" / name.replace(" ", "_")
        images = torch.stack([transform(Image.open(path)) for path in sorted(folder.iterdir())])
        with torch.no_grad():
            scores = F.normalize(clip.encode_image(images), dim=-1) @ classifier
        hits.append((scores.argsort(dim=1, descending=True) == label).float().cumsum(1))
        assert results["per_class"][label]["top1"] == pytest.approx(100 * float(hits[-1][:, 0].mean()), abs=1e-5)
    hits = torch.cat(hits)
    assert results["top1"] == pytest.approx(100 * float(hits[:, 0].mean()), abs=1e-5)
    assert results["top5"] == pytest.approx(100 * float(hits[:, 4].mean()), abs=1e-5)
    assert 0 < results["top5"] < 100


def test_other_and_random_weights_write_to_checkpoint_path(script, weights, captioned, colours, tmp_path):
    data = ("--vision_model", captioned / "small.json", "--data", colours, "--checkpoint_path", "runs", *CPU)
    code, _, err = script("zero_shot", *data, "--resume", weights)
    assert code == 0 and "RANDOM" not in err, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == "zero_shot_small_colours" or folder.name.endswith("_colours")
    code, _, err = script("zero_shot", *data)
    assert code == 0 and "THE WEIGHTS ARE RANDOM" in err


def test_evaluation_options(script, own, colours, tmp_path):
    command = ("zero_shot", "--resume", own, "--data", colours)
    settings = {
        "plain": CPU,
        "small_batches": ("--eval_batch_size", 1, "--num_workers", 2, "--device", "cpu"),
        "bf16": ("--eval_precision", "bf16", *CPU),
    }
    found = {}
    for name, typed in settings.items():
        code, _, err = script(*command, *typed, "--output", name)
        assert code == 0, err
        found[name] = read_json(tmp_path / name / "results.json")
    assert numbers(found["plain"]) == numbers(found["small_batches"])
    assert (found["plain"]["precision"], found["bf16"]["precision"]) == ("fp32", "bf16")
    assert read_json(tmp_path / "plain/options.json")["device_used"].startswith("cpu")


def test_class_and_prompt_options(script, own, tmp_path):
    for name in ("n01440764", "n01443537"):
        paint(tmp_path / "in" / name / "a.png", "red")
    (tmp_path / "names.txt").write_text("n01440764 丁鲷\nn01443537 金鱼\nn01484850 大白鲨\n", encoding="utf-8")
    (tmp_path / "templates.txt").write_text("{} here\nthis is {c}\n")
    base = ("zero_shot", "--resume", own, *CPU, "--output", "out")
    imagenet = ("--data", "imagenet", "--data_root", "in", "--template", "a {}")
    chinese = ("--data", "in", "--class_names", "names.txt")
    expected = {
        imagenet: ("imagenet", ["tench", "goldfish"], 2, ["a {}"]),
        (*imagenet, "--all_classes", "--template", "the {}"): (
            "imagenet",
            ["tench", "goldfish"],
            1000,
            ["a {}", "the {}"],
        ),
        (*chinese, "--templates", "simple"): ("in", ["丁鲷", "金鱼"], 2, None),
        (*chinese, "--all_classes", "--templates", "templates.txt"): (
            "in",
            ["丁鲷", "金鱼"],
            3,
            ["{} here", "this is {}"],
        ),
    }
    for typed, (dataset, names, classes, templates) in expected.items():
        code, _, err = script(*base, *typed)
        assert code == 0, err
        results = read_json(tmp_path / "out/results.json")
        assert (results["dataset"], results["classes"]) == (dataset, classes)
        assert [each["class"] for each in results["per_class"]] == names
        assert results["templates"] == templates or (templates is None and len(results["templates"]) == 7)


def test_download_only_with_the_option(script, own, tmp_path, monkeypatch):
    from clip_retrieval.classification import archives

    monkeypatch.setattr(archives, "download_and_extract_archive", lambda *_, **__: (tmp_path / "tried").touch())
    command = ("zero_shot", "--resume", own, "--data", "cifar100", "--data_root", "data")
    for typed, tried in (((), False), (("--download",), True)):
        code, _, err = script(*command, *typed)
        assert code == 2 and "cifar-100-python.tar.gz" in err and err.count("\n") == 1
        assert (tmp_path / "tried").exists() == tried


@pytest.mark.parametrize(
    "typed, words",
    [
        ([], ["--data"]),
        (["--data", "nowhere"], ["nowhere"]),
        (["--data", "empty"], ["empty: holds no folders"]),
        (["--data", "colours", "--class_names", "two.txt"], ["names 2 classes", "there are 3"]),
        (["--data", "colours", "--class_names", "none.txt"], ["none.txt: no such file"]),
        (["--data", "colours", "--template", "a photo"], ["a photo", "{}"]),
        (["--data", "long" * 100], ["longlong: no such folder", "cifar10"]),
        (["--data", "colours", "--templates", "long" * 100], ["longlong: no such file", "cifar"]),
        *(
            (["--data", "colours", option, ""], [f"error: {option} is empty; give it a value or leave it out"])
            for option in ("--data", "--data_root", "--class_names", "--templates", "--template", "--output")
        ),
        (["--data", "colours", "--templates", "cifer"], ["cifer", "cifar"]),
        (["--data", "cifar10", "--data_root", "empty"], ["cifar-10-python.tar.gz", "--download"]),
    ],
)
def test_bad_usage_is_one_line(script, captioned, colours, tmp_path, typed, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "two.txt").write_text("a\nb\n")
    code, _, err = script("zero_shot", "--vision_model", captioned / "small.json", *typed)
    assert code == 2 and err.count("\n") == 1 and all(word in err for word in words), err


def test_broken_image_is_named(script, own, colours):
    (colours / "red" / "2.png").write_bytes(b"no image")
    code, _, err = script("zero_shot", "--resume", own, "--data", colours, "--device", "cpu")
    assert code == 2 and str(colours / "red" / "2.png") in err and err.count("\n") == 1


@pytest.mark.slow
def test_several_processes_give_the_same_results(script, own, colours, tmp_path):
    single, several = tmp_path / "single", tmp_path / "several"
    typed = ("--resume", own, "--data", colours, *CPU, "--eval_batch_size", 3)
    assert script("zero_shot", *typed, "--output", single)[0] == 0
    started = Torchrun("scripts/zero_shot.py", *typed, "--output", several, processes=(2,), marker=several)
    code, _, err = started.end()
    assert code == 0, err
    assert numbers(read_json(single / "results.json")) == numbers(read_json(several / "results.json"))


def test_chinese_clip_with_chinese_class_names(script, real_data, colours, tmp_path):
    tiny = real_data / "chinese_clip_tiny"
    (tmp_path / "names.txt").write_text("蓝色\n绿色\n红色\n", encoding="utf-8")
    model = ("--resume", tiny / "clip_cn_tiny.pt", "--tokenizer", tiny / "vocab.txt")
    data = ("--data", colours, "--class_names", "names.txt")
    code, out, err = script("zero_shot", *model, *data, "--output", "out", *CPU)
    assert code == 0, err
    results = read_json(tmp_path / "out/results.json")
    assert (results["template_set"], [each["class"] for each in results["per_class"]]) == (
        "chinese",
        ["蓝色", "绿色", "红色"],
    )
    assert "蓝色" in out


def test_real_photographs_of_cifar100(script, own, real_data, tmp_path):
    code, _, err = script(
        *("zero_shot", "--resume", own, "--data", real_data / "cifar100_test", "--template", "a photo of a {}."),
        *("--output", "out", *CPU),
    )
    assert code == 0, err
    results = read_json(tmp_path / "out/results.json")
    assert (results["images"], results["classes"]) == (2000, 100)
    assert results["top1"] == pytest.approx(results["mean_per_class"])  # 20 images each
    assert 0 <= results["top1"] <= results["top5"] <= results["top10"] < 100


def test_imagenet_variants_have_separate_results_that_name_the_data(script, own, tmp_path):
    for name in ("imagenet-r", "sketch", "val"):
        paint(tmp_path / name / "n01440764" / "a.png", "red")
    (tmp_path / "names.txt").write_text("a fish\n")
    typed = ("zero_shot", "--resume", own, *CPU, "--data", "imagenet", "--template", "{}", "--data_root")
    folders = {
        "imagenet-r": "zero_shot_imagenet-r_own",
        "sketch": "zero_shot_imagenet_sketch_own",
        "val": "zero_shot_imagenet_own",
    }
    for name, folder in folders.items():
        code, _, err = script(*typed, name)
        assert code == 0, err
        results = read_json(own.parent / folder / "results.json")
        assert (results["dataset"], results["data_root"]) == ("imagenet", str(tmp_path / name))
        assert results["class_names"] is None
    assert script(*typed, "val", "--class_names", "names.txt")[0] == 0
    folder = own.parent / "zero_shot_imagenet_own_names"
    assert read_json(folder / "results.json")["class_names"] == str(tmp_path / "names.txt")
    settled = read_json(folder / "options.json")
    assert (settled["zero_shot_eval"], settled["zero_shot_root"]) == ("imagenet", "val")
    assert f"class_names: {tmp_path / 'names.txt'}\ntemplates: own (1), {{}}\n" in (folder / "results.txt").read_text()


def test_folders_with_the_same_name_have_separate_results(script, own, tmp_path):
    for parent in ("a", "b"):
        paint(tmp_path / parent / "test" / "red" / "a.png", "red")
        assert script("zero_shot", "--resume", own, *CPU, "--data", tmp_path / parent / "test")[0] == 0
        assert (own.parent / f"zero_shot_{parent}_test" / "results.json").is_file()


def test_unwritable_output_is_an_error(script, own, colours):
    output = colours / "red" / "0.png" / "below"
    code, _, err = script("zero_shot", "--resume", own, "--data", colours, "--output", output, "--device", "cpu")
    assert code == 2 and err.count("\n") == 1
    assert f"{output} cannot be written (Not a directory); choose another place with --output\n" in err


def test_weights_for_one_tower_warn(script, captioned, colours, tmp_path):
    torch.save(models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    model = ("--vision_model", captioned / "simple.json", "--pretrained", tmp_path / "resnet18.pth")
    code, _, err = script("zero_shot", *model, "--data", colours, "--output", "out", "--template", "{}", *CPU)
    assert code == 0 and "PARTS OF THE WEIGHTS ARE RANDOM (visual.head, text)" in err, err
