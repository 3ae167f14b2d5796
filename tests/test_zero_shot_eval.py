"""Zero-shot accuracy during training: --zero_shot_eval."""

from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from clip_retrieval.distributed import Processes
from clip_retrieval.run import prepare
from tests.conftest import read_json, read_lines

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230)}


@pytest.fixture
def coloured(tmp_path):
    """A folder with one folder of images for each of three colours."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.clip(np.array(colour) + rng.integers(-30, 30, (20, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "classes" / name / f"{number}.png")
    return tmp_path / "classes"


def zero_shot_lines(folder, kind="zero_shot"):
    return [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == kind]


def test_accuracy_before_training_after_epochs_and_of_best(run, arguments, coloured, tmp_path):
    code, out, error = run(*arguments, "--zero_shot_eval", coloured)
    assert code == 0, error
    folder = tmp_path / "logs/ex0"
    lines = zero_shot_lines(folder)
    assert [line["step"] for line in lines] == [0, 3, 6]
    results = read_json(folder / "results.json")
    assert results["zero_shot"]["images"] == 12 and results["zero_shot"]["classes"] == 3
    assert results["zero_shot_before"]["top1"] == lines[0]["top1"]
    best = {line["step"]: line["top1"] for line in lines}[results["step"]]
    assert results["zero_shot"]["top1"] == best == zero_shot_lines(folder, "zero_shot_end")[0]["top1"]
    assert out.count("zero-shot classes: 12 images") == 4


def test_accuracy_equals_that_of_the_script(run, arguments, coloured, script, tmp_path):
    assert run(*arguments, "--zero_shot_eval", coloured, "--zero_shot_templates", "simple")[0] == 0
    best = tmp_path / "logs/ex0/best.pt"
    code, _, error = script("zero_shot", "--resume", best, "--data", coloured, "--templates", "simple")
    assert code == 0, error
    found = read_json(tmp_path / "logs/ex0/zero_shot_classes_simple/results.json")
    during = read_json(tmp_path / "logs/ex0/results.json")["zero_shot"]
    names = ("top1", "mean_per_class", "template_set", "classes")
    assert [found[name] for name in names] == [during[name] for name in names]


def test_zero_shot_steps_option(run, arguments, coloured, tmp_path):
    assert run(*arguments, "--zero_shot_eval", coloured, "--imagenet_eval_steps", "2", "--no_eval_first")[0] == 0
    assert [line["step"] for line in zero_shot_lines(tmp_path / "logs/ex0")] == [2, 4, 6]


def test_evaluation_does_not_change_training(run, arguments, coloured, tmp_path):
    assert run(*arguments)[0] == 0
    assert run(*arguments, "--name", "watched", "--zero_shot_eval", coloured, "--zero_shot_steps", "1")[0] == 0
    plain, watched = (
        [line for line in read_lines(tmp_path / "logs" / name / "metrics.jsonl") if line["kind"] in ("train", "val")]
        for name in ("ex0", "watched")
    )
    assert plain == watched


def test_resumed_run_repeats_no_line(run, arguments, coloured, tmp_path):
    whole = ("--zero_shot_eval", coloured, "--zero_shot_steps", "2")
    assert run(*arguments, *whole)[0] == 0
    assert run(*arguments, *whole, "--name", "cut", "--max_steps", "4")[0] == 0
    cut = tmp_path / "logs/cut"
    code, _, error = run(
        "--resume", cut / "last.pt", "--checkpoint_path", tmp_path / "logs", "--name", "cut", "--epochs", "2"
    )
    assert code == 0, error
    assert [line["step"] for line in zero_shot_lines(cut)] == [0, 2, 4, 6]


def test_class_names_and_root_options(run, arguments, coloured, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("azure\nforest\nruby\n")
    named = ("--imagenet_eval", "--zero_shot_root", coloured, "--zero_shot_class_names", names)
    code, out, error = run(*arguments, "--max_steps", "1", *named)
    assert code == 0, error
    assert "zero-shot imagenet: 12 images, 3 classes" in out


@pytest.mark.parametrize(
    "extra, words",
    [
        (("--zero_shot_eval", "cifar1000"), ["cifar1000", "cifar100"]),
        (("--imagenet_eval", "--zero_shot_root", "/nowhere"), ["/nowhere"]),
        (("--imagenet_eval_steps", "5"), ["--zero_shot_steps", "--zero_shot_eval"]),
        (("--eval", "--zero_shot_eval", "cifar100"), ["--zero_shot_eval", "scripts/zero_shot.py"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_usage_is_one_line(run, arguments, extra, words):
    code, _, error = run(*arguments, *extra)
    assert code == 2 and error.count("\n") == 1
    assert all(word in error for word in words), error


def test_resume_finds_the_classes_from_another_folder_or_drops_them(run, arguments, coloured, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "simple").mkdir()  # named like a set of templates
    named = ("--zero_shot_eval", "classes", "--zero_shot_templates", "simple")
    assert run(*arguments, *named, "--max_steps", "2")[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resume = ("--resume", tmp_path / "logs/ex0/last.pt", "--checkpoint_path", tmp_path / "logs", "--max_steps", "4")
    code, _, error = run(*resume)
    assert code == 0, error
    assert [line["step"] for line in zero_shot_lines(tmp_path / "logs/ex0")] == [0, 2, 3, 4]

    code, _, error = run(*resume[:-1], "6", "--zero_shot_eval", "none")
    assert code == 0, error
    assert "zero_shot" not in read_json(tmp_path / "logs/ex0/results.json")


def test_messages_name_the_options_of_main(run, arguments, coloured, tmp_path):
    messages = {
        ("imagenet",): ["as --zero_shot_root,", "with --zero_shot_class_names"],
        ("cifar10",): ["cifar-10-python.tar.gz", "or give its folder as --zero_shot_root"],
        (coloured, "--zero_shot_templates", "cifer"): ["--zero_shot_templates cifer: no such file"],
    }
    for typed, words in messages.items():
        code, _, error = run(*arguments, "--zero_shot_root", coloured, "--zero_shot_eval", *typed)
        assert code == 2 and error.count("\n") == 1
        assert all(word in error for word in words) and " --data_root" not in error and "--download" not in error


def test_imagenet_in_a_subfolder_of_the_root(run, arguments, coloured, tmp_path):
    for name, wordnet_id in zip(COLOURS, ("n01440764", "n01443537", "n01484850")):
        (tmp_path / "data" / "imagenet").mkdir(parents=True, exist_ok=True)
        (coloured / name).rename(tmp_path / "data" / "imagenet" / wordnet_id)
    code, _, error = run(*arguments, "--max_steps", "1", "--imagenet_eval", "--zero_shot_root", tmp_path / "data")
    assert code == 0, error
    block = read_json(tmp_path / "logs/ex0/results.json")["zero_shot"]
    assert (block["classes"], block["data_root"]) == (3, str(tmp_path / "data/imagenet"))


def test_main_process_reads_the_classes_first(run, arguments, coloured, monkeypatch):
    """The classes are read inside main_first, so the main process extracts an archive before the others read it."""
    inside, seen = [], []
    main_first_, load_zero_shot_ = Processes.main_first, prepare.load_zero_shot

    @contextmanager
    def main_first(processes):
        with main_first_(processes):
            inside.append(True)
            yield
            inside.pop()

    def load_zero_shot(*arguments):
        seen.append(bool(inside))
        return load_zero_shot_(*arguments)

    monkeypatch.setattr(Processes, "main_first", main_first)
    monkeypatch.setattr(prepare, "load_zero_shot", load_zero_shot)
    assert run(*arguments, "--max_steps", "1", "--zero_shot_eval", coloured)[0] == 0
    assert seen == [True]


def test_retention_weight_chooses_best_by_accuracy_too(run, arguments, coloured, tmp_path, monkeypatch):
    from clip_retrieval.run import selection

    normal = selection.score_zero_shot

    def falling(run, task, kind="zero_shot"):
        return normal(run, task, kind) | {"top1": 100.0 - run.progress.step}

    monkeypatch.setattr(selection, "score_zero_shot", falling)
    weighted = ("--zero_shot_eval", coloured, "--retention_weight", "1000", "--ema", "0.9")
    code, _, error = run(*arguments, *weighted)
    assert code == 0, error
    folder = tmp_path / "logs/ex0"
    assert read_json(folder / "results.json")["step"] == 3
    # once for the weights and once for their average
    assert [line["step"] for line in zero_shot_lines(folder)] == [0, 3, 6]
    assert [line["step"] for line in zero_shot_lines(folder, "zero_shot_ema")] == [3, 6]
    code, _, error = run(*arguments, *weighted, "--zero_shot_steps", "2", "--name", "other")
    assert code == 2 and "drop --zero_shot_steps" in error
