"""scripts/zero_shot_demo.py: the top five labels of each image, printed and drawn."""

import math
import struct
import subprocess
import sys

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from clip_retrieval.data.images.photographs import Photographs
from clip_retrieval.errors import UserError
from clip_retrieval.zero_shot_demo import best_labels, probabilities, read_labels
from tests.classification.conftest import paint
from tests.conftest import ROOT
from tests.models.small import small_clip, small_preprocess

CPU = ("--device", "cpu", "--num_workers", 0)
ANIMALS = "cat,dog,great white shark,crane,bus,owl,tree"


@pytest.fixture
def photos(captioned, tmp_path):
    """Three photographs, a broken one, another file, and a subfolder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(("b.jpg", "a.PNG", "c.jpeg")):
        Image.open(captioned / f"{number}.jpg").save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.db").write_text("x")
    paint(folder / "below" / "d.png", "red")
    return folder


@pytest.fixture
def model(captioned, tmp_path):
    torch.save({"state_dict": small_clip(seed=3).state_dict()}, tmp_path / "theirs.pt")
    return ("--vision_model", captioned / "small.json", "--pretrained", tmp_path / "theirs.pt", *CPU)


def parse_output(out):
    """{image: [(percent, label), ...]}"""
    images, bars = {}, []
    for line in out.splitlines():
        percent, _, label = line.strip().partition("%  ")
        if label:
            bars.append((float(percent), label))
        else:
            bars = images[line] = []
    return {name: bars for name, bars in images.items() if bars}


def test_probabilities_are_a_softmax_of_scaled_cosines():
    images = F.normalize(torch.tensor([[1.0, 0], [1, 1]]), dim=1)
    classes = torch.tensor([[1.0, 0], [0, 1]])
    first = math.exp(2) / (math.exp(2) + 1)
    expected = torch.tensor([[first, 1 - first], [0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(probabilities(images, classes, 2.0), expected)


def test_probabilities_with_a_huge_scale():
    images, classes = torch.tensor([[1.0 + 2**-20, 0]]), torch.tensor([[1.0, 0], [0, 1]])
    assert probabilities(images, classes, 1.7e308).tolist() == [[1, 0]]


def test_top_five_labels_in_order():
    shares = torch.tensor([[0.1, 0.3, 0.1, 0.2, 0.05, 0.25]])
    assert [name for name, _ in best_labels(shares, list("abcdef"))[0]] == ["b", "f", "d", "a", "c"]
    assert best_labels(torch.tensor([[0.25, 0.75]]), ["a", "b"]) == [[("b", 75.0), ("a", 25.0)]]


def test_printed_labels_equal_the_reference(script, model, photos):
    code, out, err = script("zero_shot_demo", *model, "--img_dir", photos, "--labels", ANIMALS)
    assert code == 0, err
    found = parse_output(out)
    assert list(found) == ["a.PNG", "b.jpg", "c.jpeg"]
    assert f"skipped files without an image suffix: {photos / 'notes.db'}" in out
    assert "broken.jpg: not a readable image" in err and err.count("\n") == 1

    clip, labels = small_clip(seed=3), ANIMALS.split(",")
    tokens = open_clip.SimpleTokenizer(context_length=clip.context_length)([f"a photo of a {name}." for name in labels])
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**small_preprocess()), is_train=False
    )
    with torch.no_grad():
        texts = clip.encode_text(tokens, normalize=True)
        for name, bars in found.items():
            image = clip.encode_image(transform(Image.open(photos / name))[None], normalize=True)
            shares = (clip.logit_scale.exp() * image @ texts.T).softmax(dim=1)[0]
            best = shares.argsort(descending=True)[:5].tolist()
            assert [label for _, label in bars] == [labels[each] for each in best]
            assert [percent for percent, _ in bars] == pytest.approx([100 * float(shares[i]) for i in best], abs=0.006)


def test_checkpoint_option_has_three_names(script, checkpoint, photos, tmp_path):
    outputs = []
    for name in ("--resume", "--checkpoint_path", "--checkpoint-path"):
        code, out, err = script("zero_shot_demo", name, checkpoint, "--img_path", photos / "b.jpg", *CPU)
        assert code == 0, err
        outputs.append(out)
    assert len(set(outputs)) == 1 and len(parse_output(outputs[0])["b.jpg"]) == 5
    assert not (tmp_path / "demo_output").exists()


def test_figures_are_drawn_to_output(script, model, photos, tmp_path):
    code, out, err = script("zero_shot_demo", *model, "--img_dir", photos, "--show_prediction", "--labels", ANIMALS)
    assert code == 0 and "demo_output/zero_shot_photos.png" in out, err
    with Image.open(tmp_path / "demo_output/zero_shot_photos.png") as figure:
        assert figure.width > 1500 and figure.height > 700
        assert len(figure.convert("RGB").getcolors(2**24)) > 100
    one = ("--img_path", photos / "b.jpg", "--show_predictions", "--output", "elsewhere")
    code, _, err = script("zero_shot_demo", *model, *one)
    assert code == 0, err
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["zero_shot_b.png"]


def test_own_figures_are_not_read_as_photographs(script, model, photos, tmp_path):
    command = ("zero_shot_demo", *model, "--img_dir", photos, "--show_prediction", "--output", photos)
    outputs = [script(*command, "--labels", ANIMALS) for _ in range(2)]
    assert [code for code, *_ in outputs] == [0, 0] and outputs[0] == outputs[1]


def test_temperature_replaces_the_models_own(script, model, photos):
    one = ("zero_shot_demo", *model, "--img_path", photos / "b.jpg", "--labels", ANIMALS)
    own = math.exp(-float(small_clip(seed=3).logit_scale.detach()))
    outputs = {t: parse_output(script(*one, "--temperature", t)[1])["b.jpg"] for t in (own, 1000, 1e-7)}
    assert outputs[own] == parse_output(script(*one)[1])["b.jpg"]
    assert [percent for percent, _ in outputs[1000]] == pytest.approx([100 / 7] * 5, abs=0.05)
    assert outputs[1e-7][0][0] == 100
    assert len({bars[0][1] for bars in outputs.values()}) == 1


def test_photographs_are_upright_with_white_for_transparency(tmp_path, monkeypatch):
    turned, transparent = Image.new("RGB", (6, 4), "red"), Image.new("RGBA", (4, 4), (255, 0, 255, 0))
    exif = turned.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    turned.save(tmp_path / "turned.jpg", exif=exif)
    transparent.putpixel((0, 0), (0, 0, 255, 255))
    transparent.save(tmp_path / "transparent.png")
    upright, white = Photographs([str(tmp_path / name) for name in ("turned.jpg", "transparent.png")])
    assert upright.size == (4, 6) and upright.mode == white.mode == "RGB"
    assert white.getpixel((0, 0)) == (0, 0, 255) and white.getpixel((3, 3)) == (255, 255, 255)
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda _: struct.pack("H", "broken"))
    assert Photographs([str(tmp_path / "turned.jpg")])[0].size == (6, 4)


def test_templates_from_the_command_line(script, model, photos):
    one = ("zero_shot_demo", *model, "--img_path", photos / "b.jpg", "--labels", ANIMALS)
    default = script(*one)[1]
    assert script(*one, "--template", "a photo of a {}.")[1] == script(*one, "--templates", "single")[1] == default
    assert script(*one, "--templates", "cifar")[1] != default
    assert script(*one, "--template", "{}!")[1] != default


def test_labels_from_a_set_a_file_or_the_command_line(tmp_path):
    assert read_labels("cifar100")[1] == "aquarium fish" and len(read_labels("cifar100")) == 100
    assert [len(read_labels(name)) for name in ("cifar10", "stl10", "imagenet")] == [10, 10, 1000]
    assert read_labels("cat, great_white shark,dog,") == ["cat", "great white shark", "dog"]
    assert read_labels("苹果，狗、猫") == ["苹果", "狗", "猫"]
    assert len(read_labels(",".join(f"animal number {number}" for number in range(100)))) == 100
    (tmp_path / "labels.txt").write_text("cat, tabby\n\ndog\n")
    assert read_labels(str(tmp_path / "labels.txt")) == ["cat, tabby", "dog"]
    with pytest.raises(UserError, match="--labels cat: no such file, none of cifar10"):
        read_labels("cat")


def test_batch_size_precision_and_imagenet_labels(script, model, photos):
    base = ("zero_shot_demo", *model, "--img_dir", photos, "--labels", "imagenet")
    plain = script(*base)[1]
    assert script(*base, "--eval_batch_size", 1)[1] == plain
    assert script(*base, "--eval_precision", "bf16")[1] != plain


@pytest.mark.parametrize(
    "typed, words",
    [
        ([], ["--img_path", "--img_dir"]),
        (["--img_path", "a.jpg", "--img_dir", "photos"], ["--img_path", "--img_dir"]),
        (["--img_path", "none.jpg"], ["--img_path none.jpg: no such file"]),
        (["--img_path", "photos"], ["--img_path photos: a folder; give it as --img_dir"]),
        (["--img_dir", "photos", "--labels", "photos/notes.db"], ["notes.db: holds one label"]),
        (["--img_path", "photos/broken.jpg"], ["broken.jpg: not a readable image"]),
        (["--img_dir", "none"], ["none: no such folder"]),
        (["--img_dir", "empty"], ["empty: holds no readable images"]),
        (["--img_dir", "photos", "--labels", "cat"], ["--labels cat"]),
        (["--img_dir", "photos", "--temperature", "0"], ["--temperature 0"]),
        (["--img_dir", "photos", "--temperature", "nan"], ["--temperature nan"]),
        (["--img_dir", "photos", "--temperature", "1e-310"], ["--temperature 1e-310: too small"]),
        (["--img_dir", "photos", "--templates", "long" * 100], ["longlong: no such file"]),
        (["--img_dir", "photos", "--show_prediction", "--output", "photos/b.jpg/x"], ["another place with --output"]),
        *(
            (["--img_dir", "photos", option, ""], [f"error: {option} is empty; give it a value or leave it out"])
            for option in ("--img_path", "--img_dir", "--labels", "--templates", "--template", "--output")
        ),
        (["--img_dir", "photos", "--template", "photo"], ['"photo"']),
    ],
)
def test_bad_usage_is_one_line(script, model, photos, tmp_path, typed, words):
    (tmp_path / "empty").mkdir()
    code, _, err = script("zero_shot_demo", *model, *typed)
    (error,) = [line for line in err.splitlines() if not line.startswith("WARNING")]
    assert code == 2 and all(word in error for word in words), err


@pytest.mark.parametrize("name", ["zero_shot", "zero_shot_demo"])
def test_help_imports_no_large_library(name):
    code = (
        f"import runpy, sys; sys.argv = ['{name}.py', '--help']; sys.path.insert(0, '{ROOT / 'scripts'}')\n"
        f"try: runpy.run_path('{ROOT / 'scripts' / name}.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print([large for large in ('torch', 'numpy', 'matplotlib', 'open_clip') if large in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]" and "--template" in result.stdout


@pytest.mark.parametrize(
    "name, words",
    [
        ("visual.proj", ['image "', 'a.PNG": feature is not finite']),
        ("token_embedding.weight", ['label "cat": feature is not finite']),
        ("logit_scale", ["theirs.pt: exp(logit_scale) is not finite", "--temperature"]),
    ],
)
def test_non_finite_features_are_named_and_never_shown(script, model, photos, tmp_path, name, words):
    clip = small_clip(seed=3)
    state = clip.state_dict()
    state[name] = torch.full_like(state[name], 3e38 if state[name].ndim else 100)  # finite, but it overflows
    torch.save({"state_dict": state}, tmp_path / "theirs.pt")
    code, out, err = script("zero_shot_demo", *model, "--img_dir", photos, "--labels", "cat,dog", "--show_prediction")
    (error,) = [line for line in err.splitlines() if not line.startswith("WARNING")]
    assert code == 2 and all(word in error for word in words), err
    assert "%" not in out
