"""Files equal those of Chinese-CLIP's own scripts. Needs cn-clip (pip install --no-deps cn-clip)."""

import importlib.util
import json
import runpy
import sys

import numpy as np
import pytest
import torch

from clip_retrieval.retrieval.features import write_features
from tests.conftest import read_json, read_jsonl, write_jsonl

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("cn_clip"), reason="cn-clip is not installed")


@pytest.fixture
def theirs(monkeypatch, tmp_path):
    """theirs(name, *arguments) runs one of Chinese-CLIP's scripts."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_module(f"cn_clip.eval.{name}", run_name="__main__")

    return run


@pytest.fixture
def files(tmp_path):
    """Features of 60 images and 150 texts, and the answers."""
    rng = np.random.default_rng(0)
    images, texts = (rng.normal(size=(count, 32)).astype(np.float32) for count in (60, 150))
    texts += 0.6 * images[np.arange(150) % 60]
    write_features(tmp_path / "i.jsonl", "image", range(10**9, 10**9 + 60), images)
    write_features(tmp_path / "t.jsonl", "text", range(150), texts)
    answers = [{"text_id": t, "text": "x", "image_ids": [10**9 + t % 60, 10**9 + t % 7]} for t in range(150)]
    write_jsonl(tmp_path / "a_texts.jsonl", answers)
    return tmp_path


def test_features_are_readable_by_chinese_clip(files):
    """Chinese-CLIP reads JSON into a float32 array."""
    from clip_retrieval.retrieval.features import read_features

    array = np.array([record["feature"] for record in read_jsonl(files / "i.jsonl")], dtype=np.float32)
    np.testing.assert_array_equal(array, read_features(files / "i.jsonl", "image").vectors)


@pytest.mark.parametrize("tr, evaluation", [("", "evaluation"), ("_tr", "evaluation_tr")])
def test_predictions_and_scores_are_the_same(script, theirs, files, tr, evaluation, capsys):
    feats = ("--image-feats", files / "i.jsonl", "--text-feats", files / "t.jsonl")
    code, _, err = script(f"make_topk_predictions{tr}", *feats, "--output", "ours.jsonl")
    assert code == 0, err
    theirs(f"make_topk_predictions{tr}", *feats, "--output", files / "theirs.jsonl")
    assert (files / "ours.jsonl").read_bytes() == (files / "theirs.jsonl").read_bytes()

    assert script("transform_ir_annotation_to_tr", "--input", "a_texts.jsonl")[0] == 0
    ours = (files / "a_texts.tr.jsonl").read_bytes()
    theirs("transform_ir_annotation_to_tr", "--input", files / "a_texts.jsonl")
    assert [sorted_texts(line) for line in ours.splitlines()] == [
        sorted_texts(line) for line in (files / "a_texts.tr.jsonl").read_bytes().splitlines()
    ]
    gold = files / f"a_texts{'.tr' * bool(tr)}.jsonl"
    assert script("evaluate_predictions", gold, "ours.jsonl", "ours.json")[0] == 0
    theirs(evaluation, gold, files / "ours.jsonl", files / "theirs.json")
    ours, expected = read_json(files / "ours.json"), read_json(files / "theirs.json")
    assert ours["scoreJson"] == pytest.approx(expected["scoreJson"])
    assert ours["score"] == pytest.approx(expected["score"]) and set(ours) == set(expected)


def test_failures_have_the_same_keys(script, theirs, files):
    (files / "bad.jsonl").write_text("{\n")
    assert script("evaluate_predictions", "a_texts.jsonl", "bad.jsonl", "ours.json")[0] == 2
    theirs("evaluation", files / "a_texts.jsonl", files / "bad.jsonl", files / "theirs.json")
    ours, expected = read_json(files / "ours.json"), read_json(files / "theirs.json")
    assert set(ours) == set(expected)
    assert [ours[key] for key in ("success", "score", "scoreJson")] == [False, 0, {}]


def sorted_texts(line):
    """Drop duplicate texts: Chinese-CLIP lists a text twice if an image is twice among its answers."""
    content = json.loads(line)
    return content["image_id"], sorted({*content["text_ids"]})
