"""--caption_prefix is the same as captions with the prefix in the data."""

import shutil
from dataclasses import replace

import pytest
import torch

from clip_retrieval import evaluate_features, load_model, read_dataset
from tests.conftest import read_json

PREFIX = "a photo of "


@pytest.fixture
def prefixed(captioned, tmp_path):
    """A copy of `captioned` whose captions have the prefix."""
    folder = shutil.copytree(captioned, tmp_path / "prefixed")
    lines = (folder / "captions.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    (folder / "captions.csv").write_text("\n".join([lines[0], *(f"{a},{PREFIX}{b},{c}" for a, b, c in rows)]) + "\n")
    return folder


def test_training_and_evaluation_use_the_prefix(run, arguments, prefixed, tmp_path):
    code, _, err = run(*arguments, "--caption_prefix", PREFIX)
    assert code == 0, err
    elsewhere = [prefixed if argument == arguments[3] else argument for argument in arguments]
    assert run(*elsewhere, "--experiments", "typed")[0] == 0
    found, typed = (read_json(tmp_path / "logs" / name / "results.json") for name in ("ex0", "typed"))
    assert found["caption_prefix"] == found["val"]["caption_prefix"] == PREFIX and "caption_prefix" not in typed
    for stage in (found, found["val"], found["before"]):
        assert stage["i2t"]
    assert [found[d] for d in ("i2t", "t2i")] == [typed[d] for d in ("i2t", "t2i")]
    weights, others = (
        torch.load(tmp_path / "logs" / name / "last.pt", weights_only=True)["model"] for name in ("ex0", "typed")
    )
    assert all(torch.equal(weights[name], others[name]) for name in others)


def test_evaluation_takes_the_prefix_of_the_checkpoint(run, arguments, tmp_path):
    assert run(*arguments, "--max_steps", "2", "--caption_prefix", PREFIX)[0] == 0
    best = tmp_path / "logs/ex0/best.pt"
    found = []
    for extra in ((), ("--caption_prefix", "none")):
        code, _, err = run("--eval", "--resume", best, *extra)
        assert code == 0, err
        found.append(read_json(tmp_path / "logs/ex0/eval_csv_test/results.json"))
    assert found[0]["caption_prefix"] == PREFIX and "caption_prefix" not in found[1]
    assert found[0]["t2i"] == read_json(tmp_path / "logs/ex0/results.json")["t2i"]


def test_python_interface_and_search_use_the_prefix_of_the_checkpoint(run, script, arguments, captioned, tmp_path):
    assert run(*arguments, "--max_steps", "2", "--caption_prefix", PREFIX)[0] == 0
    best = tmp_path / "logs/ex0/best.pt"
    model, data = load_model(best, "cpu"), read_dataset("csv", captioned)
    found = evaluate_features(model.encode_images(data.images), model.encode_texts(data.captions), data.pairs)
    assert found["t2i"] == read_json(tmp_path / "logs/ex0/results.json")["t2i"]
    expected = replace(model, caption_prefix=None).encode_texts([f"{PREFIX}a red thing"])
    assert torch.equal(model.encode_texts(["a red thing"]), expected)
    place = (captioned, "--index", tmp_path / "index", "--device", "cpu")
    assert script("search", "index", *place, "--resume", best, "--num_workers", 0)[0] == 0
    found = [
        script("search", text, *place, "--json", *extra)[1]
        for text, extra in (
            ("a red thing", ()),
            (f"{PREFIX}a red thing", ("--caption_prefix", "none")),
            ("a red thing", ("--caption_prefix", "none")),
        )
    ]
    assert found[0] == found[1] != found[2]
