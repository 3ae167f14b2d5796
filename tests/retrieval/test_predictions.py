"""Scripts that turn features into predictions and predictions into scores."""

import importlib.util
import json
import time

import numpy as np
import pytest
import torch

from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.metrics import report
from clip_retrieval.evaluation.neighbours import nearest
from clip_retrieval.evaluation.ranks import retrieval_ranks
from clip_retrieval.evaluation.scores import Features
from clip_retrieval.retrieval import faiss_index
from clip_retrieval.retrieval.features import write_features
from clip_retrieval.retrieval.predictions import read_lists
from tests.conftest import read_json, read_jsonl, write_jsonl

GOLD = [
    {"text_id": 8428, "text": "高级感托特包斜挎", "image_ids": [1076345, 517602]},
    {"text_id": 1, "text": "no answer", "image_ids": []},
    {"text_id": "two", "text": "x", "image_ids": [2**62]},
]
T2I = [
    {"text_id": 8428, "image_ids": [5, 517602, 1076345, 6, 7, 8, 9, 10, 11, 12]},
    {"text_id": "two", "image_ids": [5, 6, 7, 8, 9, 10, 11, 12, 13, 2**62]},
]
I2T = [{"image_id": image, "text_ids": [1, 8428, "two"]} for image in (1076345, 517602, 2**62)]


@pytest.fixture
def features(tmp_path):
    """Features of 40 images and 90 texts, in both formats, and their ids."""
    rng = np.random.default_rng(0)
    images, texts = (rng.normal(size=(count, 16)).astype(np.float32) for count in (40, 90))
    texts += 1.5 * images[np.arange(90) % 40]
    image_ids, text_ids = [2**62 + i for i in range(40)], [f"t{i}" for i in range(90)]
    for suffix in (".jsonl", ".npy"):
        write_features(tmp_path / f"image_features{suffix}", "image", image_ids, images)
        write_features(tmp_path / f"text_features{suffix}", "text", text_ids, texts)
    return images, texts, image_ids, text_ids


def both(suffix=".jsonl"):
    return ["--image-feats", f"image_features{suffix}", "--text-feats", f"text_features{suffix}"]


@pytest.mark.parametrize("suffix", [".jsonl", ".npy"])
def test_topk_predictions_of_both_directions(script, features, tmp_path, suffix):
    images, texts, image_ids, text_ids = features
    code, out, err = script("make_topk_predictions", *both(suffix), "--top-k", 7, "--output", "p.jsonl")
    assert code == 0 and "p.jsonl" in out, err
    code, _, err = script("make_topk_predictions_tr", *both(suffix), "--output", "tr.jsonl", "--eval-batch-size", 13)
    assert code == 0, err
    scores = images.astype(np.float64) @ texts.astype(np.float64).T
    t2i, i2t = np.argsort(-scores.T, axis=1)[:, :7], np.argsort(-scores, axis=1)[:, :10]
    assert read_jsonl(tmp_path / "p.jsonl") == [
        {"text_id": text_ids[i], "image_ids": [image_ids[j] for j in row]} for i, row in enumerate(t2i)
    ]
    assert read_jsonl(tmp_path / "tr.jsonl") == [
        {"image_id": image_ids[i], "text_ids": [text_ids[j] for j in row]} for i, row in enumerate(i2t)
    ]
    assert (tmp_path / "p.jsonl").read_text().splitlines() == [json.dumps(r) for r in read_jsonl(tmp_path / "p.jsonl")]


def test_both_directions_from_one_pass(script, features, tmp_path):
    script("make_topk_predictions", *both(), "--output", "a.jsonl")
    script("make_topk_predictions_tr", *both(), "--output", "b.jsonl")
    code, _, err = script("make_topk_predictions", *both(), "--output", "c.jsonl", "--tr_output", "d.jsonl")
    assert code == 0, err
    for one, other in ("ac", "bd"):
        assert (tmp_path / f"{one}.jsonl").read_bytes() == (tmp_path / f"{other}.jsonl").read_bytes()


def test_gallery_smaller_than_k_is_listed_completely(script, features, tmp_path):
    script("make_topk_predictions", *both(), "--top-k", 1000, "--output", "p.jsonl")
    assert all(len(set(record["image_ids"])) == 40 for record in read_jsonl(tmp_path / "p.jsonl"))


def test_scores_of_the_files_equal_those_of_the_ranks(script, features, tmp_path):
    """No ties here: a file holds one order of tied items, while ranks average over all orders."""
    images, texts, image_ids, text_ids = features
    pairs = np.stack([np.arange(90) % 40, np.arange(90)], axis=1)
    expected = report(*retrieval_ranks(images, texts, pairs))
    gold = write_jsonl(
        tmp_path / "x_texts.jsonl", [{"text_id": text_ids[t], "image_ids": [image_ids[i]]} for i, t in pairs]
    )
    script("make_topk_predictions", *both(), "--output", "t2i.jsonl", "--tr_output", "i2t.jsonl")
    assert script("transform_ir_annotation_to_tr", "--input", gold)[0] == 0
    for direction in ("t2i", "i2t"):
        for answers in ("x_texts.jsonl", "x_texts.tr.jsonl"):
            code, out, err = script("evaluate_predictions", answers, f"{direction}.jsonl", "out.json")
            assert code == 0, err
            assert json.loads(out) == read_json(tmp_path / "out.json")
            scores = read_json(tmp_path / "out.json")["scoreJson"]
            for k in (1, 5, 10):
                assert scores[f"r{k}"] == pytest.approx(expected[direction][f"R@{k}"])


def test_hand_computed(script, tmp_path):
    write_jsonl(tmp_path / "gold.jsonl", GOLD)
    write_jsonl(tmp_path / "p.jsonl", T2I)
    assert script("evaluate_predictions", "gold.jsonl", "p.jsonl", "out.json")[0] == 0
    mean = (0 + 50 + 100) / 3
    scores = {"score": mean, "mean_recall": mean, "r1": 0, "r5": 50, "r10": 100}
    assert read_json(tmp_path / "out.json") == {"success": True, "score": mean, "scoreJson": scores}
    assert script("evaluate_predictions", "gold.jsonl", "p.jsonl", "out.json", "--recall_k", 2, 9)[0] == 0
    scores = {"score": 50, "mean_recall": 50, "r2": 50, "r9": 50}
    assert read_json(tmp_path / "out.json") == {"success": True, "score": 50, "scoreJson": scores}


def test_image_to_text_needs_no_transformed_file(script, tmp_path):
    write_jsonl(tmp_path / "gold.jsonl", GOLD)
    write_jsonl(tmp_path / "p.jsonl", I2T)
    code, _, err = script("evaluate_predictions", "gold.jsonl", "p.jsonl", "out.json")
    assert code == 0, err
    assert read_json(tmp_path / "out.json")["scoreJson"]["r1"] == 0
    assert script("evaluate_predictions", "gold.jsonl", "p.jsonl", "out.json", "--recall-k", "2")[0] == 0
    assert read_json(tmp_path / "out.json")["scoreJson"]["r2"] == pytest.approx(200 / 3)


def test_transformed_answers(script, tmp_path):
    write_jsonl(tmp_path / "x_texts.jsonl", [*GOLD, {"text_id": 7, "image_ids": [517602]}])
    assert script("transform_ir_annotation_to_tr", "--input", "x_texts.jsonl")[0] == 0
    assert read_jsonl(tmp_path / "x_texts.tr.jsonl") == [
        {"image_id": 1076345, "text_ids": [8428]},
        {"image_id": 517602, "text_ids": [8428, 7]},
        {"image_id": 2**62, "text_ids": ["two"]},
    ]
    code, _, err = script("transform_ir_annotation_to_tr", "--input", "x_texts.tr.jsonl")
    assert code == 2 and "already by image" in err


@pytest.mark.parametrize(
    "gold, predictions, words",
    [
        (GOLD, None, ["p.jsonl", "cannot be read"]),
        (None, T2I, ["gold.jsonl", "cannot be read"]),
        (GOLD, "", ["p.jsonl", "holds nothing"]),
        (GOLD, "{", ["p.jsonl, line 1", "broken JSON"]),
        (GOLD, [{"text_id": 8428}], ["p.jsonl, line 1", "image_ids"]),
        (GOLD, [*T2I, {"text_id": 3}], ["p.jsonl, line 3", "image_ids"]),
        (GOLD, [*T2I, {"text_id": None, "image_ids": []}], ["p.jsonl, line 3", "None", "text_id"]),
        (GOLD, [*T2I, {"text_id": 3, "image_ids": 5}], ["p.jsonl, line 3", "list"]),
        (GOLD, [*T2I, {"text_id": 3, "image_ids": [1.5]}], ["p.jsonl, line 3", "list"]),
        (GOLD, [*T2I, {"text_id": 3, "image_ids": [4, 5, 4]}], ["p.jsonl, line 3", "4 twice"]),
        (GOLD, [*T2I, T2I[0]], ["p.jsonl, line 3", "8428", "already"]),
        (GOLD, T2I[:1], ["p.jsonl", "no predictions", "'two'", "gold.jsonl"]),
        (GOLD, [T2I[0], {"text_id": "two", "image_ids": [1, 2]}], ["p.jsonl", "'two'", "2 predictions", "--top_k 10"]),
        (GOLD[1:2], T2I, ["gold.jsonl", "no text_id has an answer"]),
        (GOLD, [{"text_id": 8428, "image_ids": ["5"]}], ["another type"]),
    ],
)
def test_bad_files_are_one_line_with_success_false(script, tmp_path, gold, predictions, words):
    for name, content in (("gold.jsonl", gold), ("p.jsonl", predictions)):
        if isinstance(content, str):
            (tmp_path / name).write_text(content)
        elif content is not None:
            write_jsonl(tmp_path / name, content)
    code, out, err = script("evaluate_predictions", "gold.jsonl", "p.jsonl", "out.json")
    assert (code, out) == (2, "") and err.count("\n") == 1 and all(word in err for word in words), err
    found = read_json(tmp_path / "out.json")
    assert found["success"] is False and found["errorMsg"] in err and found["score"] == 0 and found["scoreJson"] == {}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--top-k", 0], ["k must be at least 1"]),
        (["--text-feats", "image_features.jsonl"], ["image_features.jsonl, line 1", "text_id"]),
        (["--text-feats", "short.npy"], ["short.npy", "16", "3"]),
        (["--text-feats", "nan.npy"], ["7", "nan.npy", "not finite"]),
        (["--image-feats", "none.jsonl"], ["none.jsonl", "cannot be read"]),
        (["--output", "no/p.jsonl"], ["no/p.jsonl"]),
        (["--index", "hnsw"], ["hnsw"]),
    ],
)
def test_bad_features_are_one_line(script, features, tmp_path, arguments, words):
    np.save(tmp_path / "short.npy", np.ones((4, 3), np.float32))
    spoilt = np.ones((9, 16), np.float32)
    spoilt[7, 3] = np.nan
    np.save(tmp_path / "nan.npy", spoilt)
    code, _, err = script("make_topk_predictions", *both(), "--output", "p.jsonl", *arguments)
    assert code == 2 and err.count("\n") == 1 and all(word in err for word in words), err
    assert not (tmp_path / "p.jsonl").exists()


def test_missing_faiss_is_one_line(script, features, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    code, _, err = script("make_topk_predictions", *both(), "--output", "p.jsonl", "--index", "faiss")
    assert code == 2 and err.count("\n") == 1 and "pip install faiss-cpu" in err


@pytest.mark.skipif(not importlib.util.find_spec("faiss"), reason="faiss-cpu is not installed")
@pytest.mark.parametrize("lists_from", [10**9, 10])
def test_faiss_finds_nearly_all_neighbours(script, features, tmp_path, monkeypatch, lists_from):
    monkeypatch.setattr(faiss_index, "LISTS_FROM", lists_from)
    monkeypatch.setattr(faiss_index, "QUERIES", 32)
    for suffix in (".npy", ".jsonl"):
        code, _, err = script("make_topk_predictions", *both(suffix), "--output", "a.jsonl", "--index", "faiss")
        assert code == 0, err
        script("make_topk_predictions", *both(suffix), "--output", "e.jsonl")
        found, exact = (read_jsonl(tmp_path / name) for name in ("a.jsonl", "e.jsonl"))
        assert [record["text_id"] for record in found] == [record["text_id"] for record in exact]
        same = np.mean([len({*a["image_ids"]} & {*e["image_ids"]}) for a, e in zip(found, exact)]) / 10
        assert same > 0.9 and all(len(set(record["image_ids"])) == 10 for record in found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_the_same_neighbours(features):
    images, texts, *_ = features
    found = [
        nearest(*(Features(features, torch.device(device), "item", str) for features in (images, texts)), 10)
        for device in ("cpu", "cuda")
    ]
    for direction in ("i2t", "t2i"):
        np.testing.assert_array_equal(found[0][direction].items, found[1][direction].items)


def test_answers_on_many_lines_take_linear_time(tmp_path):
    lines = [{"text_id": 1, "image_ids": [number % 90_000]} for number in range(100_000)]
    began = time.process_time()
    found = read_lists(write_jsonl(tmp_path / "gold_texts.jsonl", lines), are_answers=True)
    assert found.of == {1: list(range(90_000))} and time.process_time() - began < 10


def test_long_list_with_a_duplicate_is_refused_quickly(tmp_path):
    lines = [{"text_id": 1, "image_ids": [*range(100_000), 99_999]}]
    began = time.process_time()
    with pytest.raises(UserError, match="line 1: image_ids of text_id 1 has 99999 twice"):
        read_lists(write_jsonl(tmp_path / "p.jsonl", lines))
    assert time.process_time() - began < 10


@pytest.mark.parametrize("size", [0, -1])
def test_batch_size_below_one_is_refused(script, features, size):
    code, _, err = script("make_topk_predictions", *both(), "--output", "p.jsonl", "--eval_batch_size", size)
    assert code == 2 and "--eval_batch_size" in err and err.count("\n") == 1
