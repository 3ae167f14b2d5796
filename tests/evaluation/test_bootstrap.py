"""Bootstrap intervals against a plain loop over the same samples, and their coverage on simulated queries."""

import json

import numpy as np
import pytest

from clip_retrieval.evaluation import bootstrap
from clip_retrieval.evaluation.bootstrap import (
    bootstrap_intervals,
    bootstrap_report,
    bootstrap_values,
    first_images,
    rank_values,
)
from clip_retrieval.evaluation.metrics import hit_chances, report
from clip_retrieval.evaluation.ranks import Ranks, retrieval_ranks


def random_ranks(rng, images=23, captions=61):
    """Ranks of many-to-many pairs with ties; some images and captions have no pair."""
    features = [rng.integers(-1, 2, size=(count, 3)).astype(np.float64) for count in (images, captions)]
    pairs = np.stack([rng.integers(2, images, size=70), rng.integers(captions, size=70)], axis=1)
    return *retrieval_ranks(*features, pairs), pairs


def repeat(ranks, times):
    """Each query as often as `times` (queries,) says."""
    return ranks[np.repeat(np.arange(len(times)), times)]


@pytest.mark.parametrize("cells", [1, 500, 10**6])
def test_samples_equal_a_plain_loop(monkeypatch, cells):
    monkeypatch.setattr(bootstrap, "CELLS", cells)
    i2t, t2i, pairs = random_ranks(np.random.default_rng(0))
    owner = {caption: min(image for image, other in pairs if other == caption) for caption in t2i.queries}
    images = i2t.queries
    rng = np.random.default_rng(5)
    expected = []
    for _ in range(40):
        drawn = images[rng.integers(len(images), size=len(images))].tolist()
        times = [[drawn.count(image) for image in images], [drawn.count(owner[caption]) for caption in t2i.queries]]
        expected.append(report(repeat(i2t, times[0]), repeat(t2i, times[1]), [3]))
    first = first_images(pairs, t2i.queries)
    found = bootstrap_report(i2t, t2i, first, [3], samples=40, seed=5)
    alone = bootstrap_values({"t2i": rank_values(t2i)}, {"t2i": first}, samples=3)
    assert alone.keys() == {"t2i"} and len(alone["t2i"]["MedR"]) == 3  # of a method for one direction: without a sum
    assert found.keys() == expected[0].keys() and found["t2i"].keys() == expected[0]["t2i"].keys()
    for name, values in found.items():
        for metric, samples in values.items() if isinstance(values, dict) else [(None, values)]:
            plain = [block[name][metric] if metric else block[name] for block in expected]
            np.testing.assert_allclose(samples, plain, rtol=1e-12)
    intervals = bootstrap_intervals(i2t, t2i, pairs, [3], samples=40, level=0.8, seed=5)
    assert intervals["t2i"]["R@3"] == pytest.approx(np.quantile([b["t2i"]["R@3"] for b in expected], [0.1, 0.9]))
    assert intervals["rsum"] == pytest.approx(np.quantile([b["rsum"] for b in expected], [0.1, 0.9]))
    assert json.loads(json.dumps(intervals)) == intervals


def test_further_values_are_drawn_with_the_ranks():
    i2t, t2i, pairs = random_ranks(np.random.default_rng(1))
    further = {"i2t": {"mAP@10": hit_chances(i2t, 5)}, "t2i": {"mAP@10": 100 * hit_chances(t2i, 5)}}
    intervals = bootstrap_intervals(i2t, t2i, pairs, further=further, samples=30)
    assert intervals["t2i"]["mAP@10"] == intervals["t2i"]["R@5"] != intervals["t2i"]["R@1"]
    assert intervals["i2t"]["mAP@10"] == pytest.approx(np.array(intervals["i2t"]["R@5"]) / 100)


def test_sample_without_captions_is_left_out():
    counts = [np.array(values) for values in ([0, 1], [0, 0], [1, 1], [0, 1])]
    i2t, t2i = Ranks(*counts), Ranks(*(values[:1] for values in counts))
    intervals = bootstrap_intervals(i2t, t2i, np.array([[0, 0], [1, 0]]), samples=50)
    assert intervals["t2i"]["R@1"] == [100, 100] and intervals["t2i"]["MedR"] == [1, 1]


@pytest.mark.slow
def test_interval_covers_the_expected_recall():
    """Five captions of an image share its difficulty: 95% intervals must hold for images, not for captions."""
    rng = np.random.default_rng(0)
    images, runs, covered = 300, 400, {"i2t": 0, "t2i": 0}
    pairs = np.stack([np.arange(5 * images) // 5, np.arange(5 * images)], axis=1)
    for run in range(runs):
        chance = rng.beta(1, 1, size=images)  # the expected recall is 50%
        sides = []
        for owner in (np.arange(images), pairs[:, 0]):
            above = (rng.random(len(owner)) >= chance[owner]).astype(np.int64)
            sides.append(Ranks(above, 0 * above, 0 * above + 1, np.arange(len(owner))))
        intervals = bootstrap_intervals(*sides, pairs, samples=400, seed=run)
        for direction in covered:
            low, high = intervals[direction]["R@1"]
            covered[direction] += low <= 50 <= high
    # the standard error of a share of 95% in 400 runs is 1.1%
    assert all(0.91 <= count / runs <= 0.98 for count in covered.values()), covered
