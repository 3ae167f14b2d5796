"""scripts/interpolate.py and scripts/soup.py, with checkpoints of a small finetune."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import read_json

SCORES = ("i2t", "t2i", "rsum")


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture
def epochs(run, arguments, tmp_path):
    """Checkpoints after each of three epochs that move the weights far."""
    code, _, err = run(*arguments, "--epochs", "3", "--lr", "0.01", "--keep_every", "1", "--keep_weights_only")
    assert code == 0, err
    return [tmp_path / f"logs/ex0/epoch_{epoch}.pt" for epoch in (1, 2, 3)]


@pytest.fixture
def evaluate(run, tmp_path):
    """evaluate(checkpoint, split): the recalls that --eval finds."""
    numbers = itertools.count()

    def evaluate(checkpoint, split="test"):
        name = f"eval_{next(numbers)}"
        place = ("--checkpoint_path", tmp_path / "evals", "--experiments", name, "--eval_split", split)
        code, _, err = run("--eval", "--resume", checkpoint, "--device", "cpu", "--num_workers", "0", *place)
        assert code == 0, err
        results = read_json(tmp_path / "evals" / name / "results.json")
        return {key: results[key] for key in SCORES}

    return evaluate


@pytest.fixture
def classes(tmp_path):
    """A folder with one folder of images for each of three colours."""
    for name, colour in {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230)}.items():
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.full((20, 20, 3), colour, dtype=np.uint8) + np.uint8(number * 5)
            Image.fromarray(pixels).save(tmp_path / "classes" / name / f"{number}.png")
    return tmp_path / "classes"


def test_ends_equal_the_two_models(script, epochs, evaluate, tmp_path):
    code, out, err = script(
        "interpolate", epochs[0], epochs[2], "--alphas", "0", "0.5", "1", "--output", tmp_path / "o"
    )
    assert code == 0, err
    results = read_json(tmp_path / "o/results.json")
    assert [row["alpha"] for row in results["curve"]] == [0, 0.5, 1]
    for row, checkpoint in ((results["curve"][0], epochs[0]), (results["curve"][2], epochs[2])):
        for split in ("val", "test"):
            assert {key: row[split][key] for key in SCORES} == evaluate(checkpoint, split)
    # the best on val is chosen, and its checkpoint gives the reported recall
    best = max(results["curve"], key=lambda row: row["val"]["rsum"])
    assert results["alpha"] == best["alpha"] and results["rsum"] == best["test"]["rsum"]
    assert {key: results[key] for key in SCORES} == evaluate(tmp_path / "o/interpolated.pt")
    assert results["val"]["rsum"] == torch.load(tmp_path / "o/interpolated.pt", weights_only=True)["val"]["rsum"]
    assert f"{best['alpha']:g} *" in out and f"chosen on val: alpha {best['alpha']:g}" in out
    assert Image.open(tmp_path / "o/interpolation.png").size == (900, 600)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_chosen_checkpoint_is_the_interpolation(script, epochs, tmp_path, alpha):
    code, _, err = script("interpolate", epochs[0], epochs[2], "--alphas", alpha)
    assert code == 0, err
    first, last = weights(epochs[0]), weights(epochs[2])
    found = weights(epochs[0].parent / "interpolate_csv/interpolated.pt")
    assert found.keys() == last.keys()
    for name, value in found.items():
        expected = ((1 - alpha) * first[name].double() + alpha * last[name].double()).float()
        assert torch.equal(value, expected), name
    assert not torch.equal(first["logit_scale"], last["logit_scale"])


def test_zero_shot_accuracy_of_each_alpha(script, epochs, classes, tmp_path):
    zero_shot = ("--zero_shot_eval", classes, "--zero_shot_templates", "simple")
    code, out, err = script("interpolate", epochs[0], epochs[1], "--alphas", "0", "1", *zero_shot, "--output", "o")
    assert code == 0, err
    assert "top-1" in out
    results = read_json(tmp_path / "o/results.json")
    for row, checkpoint in zip(results["curve"], epochs):
        data = ("--data", classes, "--templates", "simple", "--output", tmp_path / "z", "--num_workers", "0")
        assert script("zero_shot", "--resume", checkpoint, *data)[0] == 0
        assert row["zero_shot"]["top1"] == read_json(tmp_path / "z/results.json")["top1"]
    assert results["zero_shot"]["images"] == 9


@pytest.mark.parametrize("weight", [0.0, 0.5, 1000.0])
def test_retention_of_each_alpha_and_its_weight_in_the_choice(
    script, epochs, evaluate, captioned, tmp_path, weight, monkeypatch
):
    # other data: the images and captions of the test split are those that are retained
    rows = (captioned / "captions.csv").read_text().splitlines()
    (tmp_path / "other").mkdir()
    kept = [f"{captioned}/{row}" for row in rows if row.endswith(",test")]
    (tmp_path / "other/captions.csv").write_text("\n".join([rows[0], *kept]) + "\n")
    retention = ("--retention_dataset", "csv", "--retention_root", tmp_path / "other", "--retention_weight", weight)
    drawn = []
    monkeypatch.setattr("clip_retrieval.interpolate.draw_interpolation", lambda *arguments: drawn.append(arguments))
    code, out, err = script("interpolate", epochs[0], epochs[2], "--alphas", "0", "0.4", "1", *retention)
    assert code == 0, err
    results = read_json(epochs[0].parent / "interpolate_csv/results.json")
    for row, checkpoint in ((results["curve"][0], epochs[0]), (results["curve"][2], epochs[2])):
        assert row["retention"]["rsum"] == evaluate(checkpoint)["rsum"]
    best = max(results["curve"], key=lambda row: row["val"]["rsum"] + weight * row["retention"]["rsum"])
    assert results["alpha"] == best["alpha"] and results["retention"]["rsum"] == best["retention"]["rsum"]
    assert drawn[0][2]["retention"] == [row["retention"]["rsum"] for row in results["curve"]]
    assert "retention rsum" in out and f"{best['retention']['rsum']:.2f}" in out
    assert (f"chosen on val + {weight:g} x retention rsum: alpha" in out) == bool(weight)


def test_retention_weight_of_zero_shot_accuracy(script, epochs, classes, tmp_path):
    zero_shot = ("--zero_shot_eval", classes, "--zero_shot_templates", "simple", "--retention_weight", "100")
    code, out, err = script("interpolate", epochs[0], epochs[1], "--alphas", "0", "1", *zero_shot, "--output", "o")
    assert code == 0, err
    results = read_json(tmp_path / "o/results.json")
    best = max(results["curve"], key=lambda row: row["val"]["rsum"] + 100 * row["zero_shot"]["top1"])
    assert results["alpha"] == best["alpha"] and "chosen on val + 100 x top-1: alpha" in out


def test_interpolation_refuses_what_it_cannot_use(script, run, arguments, epochs, captioned, tmp_path):
    code, _, err = script("interpolate", epochs[0], epochs[1], "--alphas", "0", "1.5")
    assert code == 2 and "--alphas 1.5: must be from 0" in err
    code, _, err = script("interpolate", epochs[0], captioned / "captions.csv")
    assert code == 2 and len(err.splitlines()) == 1
    rows = [row for row in (captioned / "captions.csv").read_text().splitlines() if not row.endswith(",val")]
    (tmp_path / "no_val.csv").write_text("\n".join(rows) + "\n")
    images = ("--image_dir", captioned)
    code, _, err = script("interpolate", epochs[0], epochs[1], "--annotations", tmp_path / "no_val.csv", *images)
    assert code == 2 and "has no val split to choose on" in err


def test_uniform_soup_is_the_mean_and_evaluates_and_resumes(script, run, epochs, evaluate, arguments, tmp_path):
    code, out, err = script("soup", *epochs, "--output", tmp_path / "soup.pt")
    assert code == 0, err
    assert "the mean of 3 checkpoints" in out
    states = [weights(path) for path in epochs]
    for name, value in weights(tmp_path / "soup.pt").items():
        assert value.dtype == states[0][name].dtype
        if value.is_floating_point():
            mean = sum(state[name].double() for state in states) / 3
            torch.testing.assert_close(value.double(), mean, atol=1e-7, rtol=1e-6)
    assert evaluate(tmp_path / "soup.pt")["rsum"] > 0
    code, _, err = run(*arguments, "--pretrained", tmp_path / "soup.pt", "--name", "again", "--max_steps", "1")
    assert code == 0, err
    code, _, err = script("export", tmp_path / "soup.pt", tmp_path / "exported", "--format", "open_clip")
    assert code == 0, err
    code, _, err = script("soup", *epochs, "--output", tmp_path / "soup.pt")
    assert code == 2 and "already exists" in err


def test_greedy_soup_equals_a_brute_force_loop(script, epochs, evaluate, tmp_path):
    code, out, err = script("soup", *epochs, "--output", tmp_path / "soup.pt", "--greedy")
    assert code == 0, err

    def rsum(paths):
        states = [weights(path) for path in paths]
        content = torch.load(paths[0], weights_only=True) | {"state_dict": None}
        content["model"] = {
            name: (sum(state[name].double() for state in states) / len(states)).to(value.dtype)
            for name, value in states[0].items()
        }
        del content["state_dict"]
        torch.save(content, tmp_path / "trial.pt")
        return evaluate(tmp_path / "trial.pt", "val")["rsum"]

    single = {path: rsum([path]) for path in epochs}
    order = sorted(epochs, key=lambda path: single[path], reverse=True)
    used, best = order[:1], single[order[0]]
    for path in order[1:]:
        if (score := rsum([*used, path])) >= best:
            used, best = [*used, path], score
    assert f"the mean of {len(used)} of 3 checkpoints, val rsum {best:.2f}" in out
    assert out.count("added") == len(used) - 1
    assert evaluate(tmp_path / "soup.pt", "val")["rsum"] == pytest.approx(best)
    found = weights(tmp_path / "soup.pt")
    for name, value in found.items():
        if value.is_floating_point():
            mean = sum(weights(path)[name].double() for path in used) / len(used)
            torch.testing.assert_close(value.double(), mean, atol=1e-7, rtol=1e-6)


def test_soup_of_different_architectures_is_refused(script, run, arguments, epochs, captioned, tmp_path):
    other = ("--vision_model", captioned / "resnet.json", "--name", "resnet", "--max_steps", "1")
    assert run(*arguments, *other)[0] == 0
    resnet = tmp_path / "logs/resnet/best.pt"
    for command in (
        ("soup", epochs[0], resnet, "--output", tmp_path / "s.pt"),
        ("soup", epochs[0], resnet, "--output", tmp_path / "s.pt", "--greedy"),
        ("interpolate", resnet, epochs[0]),
    ):
        code, _, err = script(*command)
        assert code == 2 and len(err.splitlines()) == 1 and "Traceback" not in err, err
        assert not (tmp_path / "s.pt").exists()
    code, _, err = script("soup", epochs[0], "--output", tmp_path / "s.pt")
    assert code == 2 and "at least two checkpoints" in err
