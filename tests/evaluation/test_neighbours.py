"""The top k items of each query against a float64 brute force over the full score matrix."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_retrieval.distributed import Processes
from clip_retrieval.errors import UserError
from clip_retrieval.evaluation import neighbours as module
from clip_retrieval.evaluation.neighbours import nearest
from clip_retrieval.evaluation.scores import Features, rounding_bound

TIE = 1e-10
CPU = torch.device("cpu")
KINDS = ["continuous", "small integers", "duplicates", "near ties", "lengths", "collapsed"]


def brute_force(queries, items, k):
    """(items, first place of each item's group, size of the last group), one query at a time, in float64.

    The best remaining item leads a group; the items equal to it follow in index order.
    """
    queries, items = np.asarray(queries, np.float64), np.asarray(items, np.float64)
    norms = np.linalg.norm(items, axis=1)
    rows = []
    for query in queries:
        scores, left = (items * query).sum(1), np.ones(len(items), bool)
        order, begin = [], []
        while len(order) < min(k, len(items)):
            leader = np.where(left, scores, -np.inf).argmax()
            equal = TIE * np.linalg.norm(query) * np.maximum(norms, norms[leader])
            group = np.flatnonzero(left & (scores >= scores[leader] - equal))
            begin += [len(order)] * len(group)
            order += list(group)
            left[group] = False
        rows.append((order[:k], begin[:k], len(group)))
    return [np.array(column) for column in zip(*rows)]


def side(features, kind="image"):
    return Features(features, CPU, kind, str)


def find(images, texts, k, **options):
    return nearest(side(images), side(texts, "caption"), k, **options)


def assert_exact(images, texts, k, **options):
    found = find(images, texts, k, **options)
    for direction, (queries, items) in {"i2t": (images, texts), "t2i": (texts, images)}.items():
        expected, begin, size = brute_force(queries, items, k)
        np.testing.assert_array_equal(found[direction].items, expected)
        np.testing.assert_array_equal(found[direction].begin, begin)
        np.testing.assert_array_equal(found[direction].size, size)
    return found


def random_sides(rng, counts, dim, kind, dtype):
    for count in counts:
        features = rng.normal(size=(count, dim))
        if kind == "small integers":
            features = rng.integers(-1, 2, size=(count, dim)).astype(float)
        if kind == "duplicates":
            features = features[rng.integers(count, size=count)]
        if kind == "near ties":
            features = features[rng.integers(3, size=count) % count] * (1 + 1e-9 * rng.integers(3, size=(count, 1)))
        if kind == "lengths":
            features *= np.exp(2 * rng.normal(size=(count, 1)))
        if kind == "collapsed":
            features = features[:1].repeat(count, axis=0)
        yield features.astype(dtype)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    images=st.integers(1, 25),
    captions=st.integers(1, 40),
    dim=st.integers(1, 40),
    k=st.integers(1, 50),
    tile=st.tuples(st.integers(1, 30), st.integers(1, 45)),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    collected=st.integers(1, 60),
    crowd=st.sampled_from([module.CROWD, -1000]),  # no query is crowded, all queries are
    dense=st.integers(1, 60),
)
def test_neighbours_equal_float64(seed, images, captions, dim, k, tile, kind, dtype, collected, crowd, dense):
    sides = random_sides(np.random.default_rng(seed), (images, captions), dim, kind, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "COLLECTED", collected)
        patch.setattr(module, "CROWD", crowd)
        patch.setattr(module, "DENSE", dense)
        assert_exact(*sides, k, tile=tile)


@pytest.mark.parametrize("kind", KINDS)
def test_more_items_than_groups(kind):
    sides = random_sides(np.random.default_rng(1), (150, 700), 12, kind, np.float32)
    assert_exact(*sides, 10, tile=(70, 300))


@pytest.mark.parametrize("spread", [0, 1e-6, 1e-3])
def test_nearly_equal_features_are_scored_in_float64(monkeypatch, spread):
    monkeypatch.setattr(module, "COLLECTED", 100)
    rng = np.random.default_rng(2)
    images, texts = (rng.normal(size=64) + spread * rng.normal(size=(count, 64)) for count in (90, 400))
    rows = []
    sort = module._ExactNeighbours.sort_all_items
    monkeypatch.setattr(module._ExactNeighbours, "sort_all_items", lambda self, q: (rows.append(len(q)), sort(self, q)))
    assert_exact(images, texts, 5, tile=(50, 100))
    assert rows[0] > 0 or spread > 1e-4


def test_order_that_float32_cannot_decide():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, 64))
    text = np.concatenate([image * (1 + 1e-9 * step) for step in (0, 1, -1, 2, 0)])
    assert len(np.unique(image.astype(np.float32) @ text.astype(np.float32).T)) < 4
    found = assert_exact(image, text, 5)
    assert found["i2t"].items.tolist() == [[3, 1, 0, 4, 2]]


def test_float32_scores_in_the_wrong_order_are_resolved():
    """All items are candidates whose float32 scores are in the wrong order by nearly twice the bound."""
    rng = np.random.default_rng(3)
    query = rng.normal(size=(1, 512)).astype(np.float32)
    items = query + 1e-4 * rng.normal(size=(300, 512)).astype(np.float32)
    fast = (query @ items.T)[0]
    exact = (query.astype(np.float64) @ items.astype(np.float64).T)[0]
    assert (np.argsort(fast) != np.argsort(exact)).any()
    assert (
        np.abs(fast - exact).max()
        < rounding_bound(512)[0] * np.linalg.norm(query) * np.linalg.norm(items, axis=1).max()
    )
    assert_exact(query, items, 10)


def test_equal_items_come_in_index_order():
    texts = np.random.default_rng(1).normal(size=(1, 513)).repeat(2000, axis=0)
    found = find(np.random.default_rng(2).normal(size=(3, 513)), texts, 4, tile=(2, 900))
    assert found["i2t"].items.tolist() == [[0, 1, 2, 3]] * 3
    assert (found["i2t"].size == 2000).all() and (found["i2t"].begin == 0).all()


@pytest.mark.parametrize("tile", [(1, 1), (3, 1000), (1000, 3), (7, 11), (512, 512)])
def test_tile_size_changes_nothing(tile):
    rng = np.random.default_rng(3)
    images, texts = rng.integers(-1, 2, size=(37, 4)).astype(float), rng.integers(-1, 2, size=(53, 4)).astype(float)
    expected, found = find(images, texts, 6), find(images, texts, 6, tile=tile)
    for direction in expected:
        np.testing.assert_array_equal(found[direction].items, expected[direction].items)


def test_single_direction():
    rng = np.random.default_rng(4)
    images, texts = rng.normal(size=(9, 5)), rng.normal(size=(13, 5))
    both = find(images, texts, 3)
    for direction in both:
        single = find(images, texts, 3, directions=[direction])
        assert list(single) == [direction]
        np.testing.assert_array_equal(single[direction].items, both[direction].items)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_scale_of_the_features_changes_nothing(scale):
    rng = np.random.default_rng(5)
    images, texts = rng.normal(size=(30, 24)).astype(np.float32), rng.normal(size=(60, 24)).astype(np.float32)
    power = np.float32(2.0 ** round(np.log2(scale)))
    plain, scaled = find(images, texts, 7), find(images * power, texts, 7)
    for direction in plain:
        np.testing.assert_array_equal(scaled[direction].items, plain[direction].items)


@pytest.mark.parametrize("kind", ["continuous", "duplicates", "collapsed"])
def test_processes_share_the_tiles(monkeypatch, kind):
    """Two processes run in turn: the second receives the tensors that the first one sent."""
    monkeypatch.setattr(module, "COLLECTED", 50)
    images, texts = random_sides(np.random.default_rng(6), (40, 120), 8, kind, np.float32)
    sent = []

    class First(Processes):
        def max(self, tensor):
            sent.append(tensor.clone())
            return tensor

        def all_gather_rows(self, tensor):
            sent.append(tensor.clone())
            return tensor

    class Second(Processes):
        def max(self, tensor):
            return torch.maximum(tensor, sent.pop(0))

        def all_gather_rows(self, tensor):
            return torch.cat([sent.pop(0), tensor])

    expected = find(images, texts, 5, tile=(16, 16))
    find(images, texts, 5, tile=(16, 16), processes=First(0, 2))
    found = find(images, texts, 5, tile=(16, 16), processes=Second(1, 2))
    assert sent == []
    for direction in expected:
        np.testing.assert_array_equal(found[direction].items, expected[direction].items)


def test_bad_usage_is_refused():
    with pytest.raises(UserError, match="k must be at least 1"):
        find(np.ones((2, 3)), np.ones((2, 3)), 0)
    with pytest.raises(UserError, match=r"3 dimensions.*4"):
        find(np.ones((2, 3)), np.ones((2, 4)), 1)
