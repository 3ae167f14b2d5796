"""Recall and expected ranks against a loop over every order of the tied items."""

import json
from itertools import permutations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.metrics import expected_ranks, recall_at, report, retrieval_metrics
from clip_retrieval.evaluation.ranks import Ranks, retrieval_ranks


def ranks(*queries):
    return Ranks(*np.array(queries, np.int64).reshape(-1, 3).T, np.arange(len(queries)))


@given(above=st.integers(0, 4), tied=st.integers(0, 4), positives=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_expectation_over_every_order_of_tied_items(above, tied, positives):
    orders = [(False,) * above + order for order in permutations([False] * tied + [True] * positives)]
    query = ranks((above, tied, positives))
    for k in range(1, above + tied + positives + 2):
        hits = np.mean([any(order[:k]) for order in orders])
        assert recall_at(query, k) == pytest.approx(100 * hits, abs=1e-9)
    assert expected_ranks(query)[0] == pytest.approx(np.mean([1 + order.index(True) for order in orders]))


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 5)), min_size=1, max_size=20),
    st.integers(1, 30),
)
def test_recall_equals_the_formula(queries, k):
    def hit(above, tied, positives):
        places = k - above
        if places <= 0 or places > tied:
            return float(places > tied)
        return 1 - comb(tied, places) / comb(tied + positives, places)

    assert recall_at(ranks(*queries), k) == pytest.approx(100 * np.mean([hit(*query) for query in queries]))


def test_millions_of_tied_items_do_not_overflow():
    assert recall_at(ranks((0, 10**6 - 1, 1)), 1000) == pytest.approx(0.1)
    assert recall_at(ranks((5, 10**9, 3)), 10) == pytest.approx(100 * 15 / (10**9 + 3), rel=1e-6)


def test_hand_computed_metrics():
    metrics = retrieval_metrics(ranks((0, 0, 1), (0, 1, 1), (4, 0, 2), (20, 3, 1)))
    assert metrics == pytest.approx(
        {"R@1": 37.5, "R@5": 75, "R@10": 75, "MedR": (1.5 + 5) / 2, "MeanR": (1 + 1.5 + 5 + 22.5) / 4}
    )


def test_further_k_come_in_numeric_order():
    query = ranks((2, 0, 1))
    assert list(retrieval_metrics(query, [50, 3, 5])) == ["R@1", "R@3", "R@5", "R@10", "R@50", "MedR", "MeanR"]
    assert retrieval_metrics(query, [3])["R@3"] == 100
    with pytest.raises(UserError, match="recall at 0"):
        retrieval_metrics(query, [0])


def test_report_sums_the_six_recalls_only():
    i2t, t2i = ranks((0, 0, 1), (6, 0, 1)), ranks((3, 0, 1), (30, 0, 1))
    result = report(i2t, t2i, recall_k=(1, 5, 10, 100))
    assert result["rsum"] == 50 + 50 + 100 + 0 + 50 + 50
    assert result["mean_recall"] == 50
    assert result["t2i"]["R@100"] == 100
    assert json.loads(json.dumps(result)) == result


def test_collapsed_model_scores_chance():
    features = np.full((50, 16), 0.1, np.float32)
    pairs = np.stack([np.arange(50), np.arange(50)], 1)
    result = report(*retrieval_ranks(features, features, pairs))
    for direction in ("i2t", "t2i"):
        assert [result[direction][f"R@{k}"] for k in (1, 5, 10)] == pytest.approx([2, 10, 20])
        assert result[direction]["MedR"] == result[direction]["MeanR"] == 25.5


def test_recall_at_huge_k():
    ranks = Ranks(*(np.array(values, np.int64) for values in ([0, 7], [0, 3], [1, 1], [0, 1])))
    assert recall_at(ranks, 10**30) == recall_at(ranks, 2**63) == recall_at(ranks, 100) == 100
