"""simple-clip models through main.py."""

import pytest
import torch
from torchvision import models

from tests.conftest import read_json, read_lines
from tests.models.small import WORDS
from tests.models.test_simple_clip_weights import Reference


@pytest.fixture
def simple(arguments, captioned):
    """Arguments of a small finetune of a simple-clip model."""
    at = arguments.index("--vision_model")
    return [*arguments[:at], "--vision_model", captioned / "simple.json", *arguments[at + 2 :]]


def test_resume_after_kill_is_bit_identical_and_evaluates(run, run_killed, simple, tmp_path):
    command = [*simple, "--max_steps", 4, "--eval_every", 0, "--no_eval_first", "--grad_checkpointing"]
    assert run(*command, "--experiments", "whole")[0] == 0
    command += ["--experiments", "killed", "--save_every", 2, "--resume", "auto"]
    run_killed(4, *command)
    code, _, err = run(*command)
    assert code == 0, err
    whole, killed = tmp_path / "logs/whole", tmp_path / "logs/killed"
    weights, again = (torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (whole, killed))
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    code, _, err = run("--eval", "--resume", killed / "last.pt")
    assert code == 0, err
    results = [read_json(path) for path in (whole / "results.json", killed / "eval_csv_test/results.json")]
    assert results[0]["i2t"] == results[1]["i2t"] and results[0]["t2i"] == results[1]["t2i"]
    assert results[1]["model"] == str(simple[simple.index("--vision_model") + 1])


@pytest.mark.parametrize("extra", ["--loss siglip", "--trainable linear_projection", "--grad_cache 5 --freeze_text"])
def test_model_trains_with_other_losses_and_options(run, simple, tmp_path, extra):
    code, out, err = run(*simple, *extra.split(), "--max_steps", 2)
    assert code == 0, err
    assert read_json(tmp_path / "logs/ex0/results.json")["images"] == 6
    if "siglip" in extra:
        first = read_lines(tmp_path / "logs/ex0/metrics.jsonl")
        scales = [line["logit_scale"] for line in first if line["kind"] == "train"]
        assert scales[0] == pytest.approx(10, rel=0.01)
    else:
        assert "tower is frozen" in out


def test_torchvision_weights_are_loaded_and_logged(run, simple, tmp_path):
    torch.save(models.resnet18(weights=None).state_dict(), tmp_path / "resnet18-f37072fd.pth")
    code, out, err = run(*simple, "--pretrained", tmp_path / "resnet18-f37072fd.pth", "--max_steps", 1)
    assert code == 0, err
    assert "resnet18-f37072fd.pth for images, none for captions" in out


@pytest.mark.parametrize("preset", ["none", "simple_clip"])
def test_simple_clip_checkpoint_is_evaluated_and_finetuned(run, arguments, captioned, tmp_path, preset):
    torch.save(Reference().state_dict(), tmp_path / "clip_model.pth")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    theirs = ("--resume", tmp_path / "clip_model.pth", "--tokenizer", tmp_path / "vocab.txt", "--image_size", 32)
    theirs += ("--preset", preset, "--precision", "fp32")
    at = arguments.index("--vision_model")
    data = [*arguments[:at], *arguments[at + 2 :]]
    code, out, err = run("--eval", *data, *theirs)
    assert code == 0, err
    assert f"resnet18, 11.6 M parameters, weights: {tmp_path / 'clip_model.pth'}" in out
    evaluated = read_json(tmp_path / "logs/eval_resnet18_csv_test/results.json")
    code, _, err = run(*data, *theirs, "--max_steps", 1)
    assert code == 0, err
    before = read_json(tmp_path / "logs/ex0/results.json")["before"]
    assert (before["i2t"], before["t2i"]) == (evaluated["i2t"], evaluated["t2i"])
