"""mAP@K against plain loops over all orders of tied items."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_retrieval.evaluation.average_precision import average_precisions, precisions_at_r
from clip_retrieval.evaluation.metrics import report
from clip_retrieval.evaluation.ranks import retrieval_ranks
from clip_retrieval.evaluation.scores import Features
from tests.conftest import read_json


def average_precision(relevant, k):
    """relevant: bools in retrieval order."""
    hits, total = 0, 0.0
    for place, hit in enumerate(relevant[:k], 1):
        if hit:
            hits += 1
            total += hits / place
    return total / min(k, sum(relevant))


def plain_map(scores, relevant, k):
    """mAP@K in percent, averaged over every order of equal scores. scores, relevant: (queries, items)."""
    values = []
    for row, hits in zip(scores, relevant):
        if hits.any():
            orders = [
                sorted(range(len(row)), key=lambda i, p=p: (-row[i], p[i])) for p in permutations(range(len(row)))
            ]
            values.append(np.mean([average_precision([hits[i] for i in order], k) for order in orders]))
    return 100 * np.mean(values)


def mean_map(*args):
    found = average_precisions(*args)
    return {direction: {name: values.mean() for name, values in block.items()} for direction, block in found.items()}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 5),
    captions=st.integers(1, 5),
    levels=st.integers(1, 4),
    ks=st.sets(st.integers(1, 7), min_size=1, max_size=3),
)
def test_ties_give_the_mean_over_all_orders(seed, images, captions, levels, ks):
    rng = np.random.default_rng(seed)
    scores = rng.integers(levels, size=(images, captions)).astype(float)
    relevant = rng.random((images, captions)) < 0.4
    relevant[rng.integers(images), rng.integers(captions)] = True
    # with np.eye as text features, the inner products are the scores
    pairs = np.argwhere(relevant)
    found = mean_map(scores, np.eye(captions), np.concatenate([pairs, pairs[:1]]), ks)
    for k in ks:
        assert found["i2t"][f"mAP@{k}"] == pytest.approx(plain_map(scores, relevant, k))
        assert found["t2i"][f"mAP@{k}"] == pytest.approx(plain_map(scores.T, relevant.T, k))


def plain_at_r(scores, relevant):
    """(R-Precision, mAP@R) in percent, averaged over every order of equal scores."""
    values = []
    for row, hits in zip(scores, relevant):
        if size := hits.sum():
            orders = [
                sorted(range(len(row)), key=lambda i, p=p: (-row[i], p[i])) for p in permutations(range(len(row)))
            ]
            first = [[hits[i] for i in order][:size] for order in orders]
            values.append([np.mean([np.mean(hit) for hit in first]), 0.0])
            values[-1][1] = np.mean([sum(sum(h[: i + 1]) / (i + 1) for i in range(size) if h[i]) / size for h in first])
    return 100 * np.mean(values, axis=0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), queries=st.integers(1, 5), count=st.integers(1, 6), levels=st.integers(1, 4))
def test_r_precision_and_map_at_r_equal_a_loop_over_orders(seed, queries, count, levels):
    rng = np.random.default_rng(seed)
    scores = rng.integers(levels, size=(queries, count)).astype(float)
    relevant = rng.random((queries, count)) < 0.4
    relevant[rng.integers(queries), rng.integers(count)] = True
    sides = [Features(part, torch.device("cpu"), "item", str) for part in (scores, np.eye(count))]
    found = precisions_at_r(*sides, *np.argwhere(relevant).T, relevant.sum(axis=1))
    assert (np.isnan(found["R-P"]) == ~relevant.any(axis=1)).all()
    np.testing.assert_allclose(
        np.nanmean([found["R-P"], found["mAP@R"]], axis=1), plain_at_r(scores, relevant), atol=1e-9
    )


def test_hand_computed():
    scores = np.array([[0.9, 0.8, 0.7, 0.6, 0.5]])
    found = mean_map(scores, np.eye(5), np.array([[0, 0], [0, 2], [0, 4]]), [1, 3, 10])
    expected = {1: 1, 3: (1 + 2 / 3) / 3, 10: (1 + 2 / 3 + 3 / 5) / 3}
    assert found["i2t"] == pytest.approx({f"mAP@{k}": 100 * value for k, value in expected.items()})


def test_map_at_one_equals_recall_at_one():
    rng = np.random.default_rng(0)
    images = rng.integers(-1, 2, size=(30, 4)).astype(np.float32)
    texts = rng.integers(-1, 2, size=(70, 4)).astype(np.float32)
    pairs = np.stack([rng.integers(30, size=90), rng.integers(70, size=90)], axis=1)
    recall = report(*retrieval_ranks(images, texts, pairs))
    found = mean_map(images, texts, pairs)
    for direction in ("i2t", "t2i"):
        assert found[direction]["mAP@1"] == pytest.approx(recall[direction]["R@1"])


def test_collapsed_model_scores_chance():
    pairs = np.stack([np.arange(200) // 4, np.arange(200)], axis=1)
    found = mean_map(np.ones((50, 3)), np.ones((200, 3)), pairs)
    assert found["i2t"]["mAP@1"] == pytest.approx(2) and found["t2i"]["mAP@1"] == pytest.approx(2)


def test_map_is_in_the_results_with_the_option(run, arguments, tmp_path):
    found = {}
    for name, option in (("with", ["--map"]), ("without", [])):
        code, out, err = run(*arguments, "--eval", "--experiments", name, *option)
        assert code == 0, err
        found[name] = read_json(tmp_path / "logs" / name / "results.json")
        assert ("mAP@10" in out) == (name == "with")
    for direction in ("i2t", "t2i"):
        block = found["with"][direction]
        assert list(block)[-3:] == ["mAP@1", "mAP@5", "mAP@10"]
        assert block["mAP@1"] == pytest.approx(block["R@1"]) and 0 < block["mAP@10"] <= 100
        assert list(block)[:-3] == list(found["without"][direction])
