"""Percentile bootstrap of the figures of a split, over images.

A sample draws as many images as there are, with replacement; an image's captions are drawn with it, because the five
captions of an image succeed and fail together (the cluster bootstrap: Field and Welsh, Bootstrapping clustered data,
Journal of the Royal Statistical Society B 69, 2007). A caption of several images is drawn with the first of them, so
that each query has one cluster. The gallery stays the same: the interval covers the choice of the queries, not that of
the gallery nor the randomness of training.

Memory grows with images + captions; a chunk of samples is computed at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from clip_retrieval.evaluation.metrics import STANDARD_K, expected_ranks, hit_chances
from clip_retrieval.evaluation.ranks import Ranks

SAMPLES = 1000
LEVEL = 0.95
CELLS = 2**21  # samples x queries to compute at a time
MEDIAN = "MedR"
Values = dict[str, np.ndarray]
"""The values of the queries of a direction by the name of their mean, float64 (queries,); the median for "MedR"."""


def bootstrap_intervals(
    i2t: Ranks,
    t2i: Ranks,
    pairs: np.ndarray,
    recall_k: Iterable[int] = STANDARD_K,
    *,
    further: dict[str, Values] | None = None,
    samples: int = SAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute the interval [low, high] of each figure of `metrics.report`, in its structure and units.

    Args:
        i2t, t2i: the ranks of both directions.
        pairs: the relevant (image index, caption index), (P, 2).
        recall_k: further K besides 1, 5 and 10.
        further: other values of the same queries, {"i2t": {"mAP@10": (queries,)}, ...}.
        samples: number of bootstrap samples.
        level: share of the samples within the interval.
        seed: of the samples.
    """
    values = {name: rank_values(ranks, recall_k) for name, ranks in (("i2t", i2t), ("t2i", t2i))}
    values = {name: own | (further or {}).get(name, {}) for name, own in values.items()}
    images = {"i2t": i2t.queries, "t2i": first_images(pairs, t2i.queries)}
    return to_intervals(bootstrap_values(values, images, samples=samples, seed=seed), level)


def to_intervals(drawn: dict[str, Any], level: float = LEVEL) -> dict[str, Any]:
    """Replace the values of the samples by their intervals, in the same structure."""
    return {
        name: to_intervals(values, level) if isinstance(values, dict) else interval(values, level)
        for name, values in drawn.items()
    }


def interval(values: np.ndarray, level: float = LEVEL) -> list[float]:
    """Return the percentile interval [low, high] of the values of the samples."""
    return np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist()


def first_images(pairs: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """The lowest index of an image of each of these captions, int64 (captions,)."""
    pairs = np.asarray(pairs)
    order = np.lexsort(pairs.T)  # by caption, then image
    return pairs[order][np.searchsorted(pairs[order, 1], captions), 0]


def rank_values(ranks: Ranks, recall_k: Iterable[int] = STANDARD_K) -> Values:
    """The values of each query whose means are recall in percent and MeanR, and whose median is MedR."""
    expected = expected_ranks(ranks)
    values = {f"R@{k}": 100 * hit_chances(ranks, k) for k in sorted({*STANDARD_K, *recall_k})}
    return values | {"MedR": expected, "MeanR": expected}


def bootstrap_report(
    i2t: Ranks, t2i: Ranks, first_image: np.ndarray, recall_k: Iterable[int] = STANDARD_K, **sampling: int
) -> dict[str, Any]:
    """Compute `metrics.report` of each sample: its structure, with float64 (samples,) instead of numbers.

    first_image (t2i queries,) is the image with which each caption is drawn. For `sampling`, see `bootstrap_values`.
    """
    values = {"i2t": rank_values(i2t, recall_k), "t2i": rank_values(t2i, recall_k)}
    return bootstrap_values(values, {"i2t": i2t.queries, "t2i": first_image}, **sampling)


def bootstrap_values(
    values: dict[str, Values], images: dict[str, np.ndarray], *, samples: int = SAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Compute the figures of each sample, {direction: {figure: float64 (samples,)}}, and rsum and mean_recall.

    Two models that are scored on the same queries get the same samples, so their differences are paired. A sample
    without any query of a direction has NaN. rsum and mean_recall need the recalls of both directions.

    Args:
        values: the values of the queries of one or both directions, by direction.
        images: int64 (queries,), the image with which each query is drawn, by direction.
        samples: number of bootstrap samples.
        seed: of the samples.
    """
    # number the images; add up the values of the queries of each
    numbers, cluster = np.unique(np.concatenate([images[name] for name in values]), return_inverse=True)
    clusters = np.split(cluster, np.cumsum([len(images[name]) for name in values])[:-1])
    sides = {name: _Queries(own, part, len(numbers)) for (name, own), part in zip(values.items(), clusters)}

    # draw the images of some samples at a time
    rng = np.random.default_rng(seed)
    chunk = max(1, CELLS // len(cluster))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in sides}
    for start in range(0, samples, chunk):
        count = min(chunk, samples - start)
        cells = rng.integers(len(numbers), size=(count, len(numbers))) + np.arange(count)[:, None] * len(numbers)
        weights = np.bincount(cells.ravel(), minlength=cells.size).reshape(cells.shape)
        for name, side in sides.items():
            parts[name].append(side.report(weights))

    # name the columns
    drawn: dict[str, Any] = {name: dict(zip(sides[name].names, np.concatenate(rows).T)) for name, rows in parts.items()}
    if len(drawn) == 2 and all(f"R@{k}" in own for own in drawn.values() for k in STANDARD_K):
        drawn["rsum"] = sum(drawn[name][f"R@{k}"] for name in sides for k in STANDARD_K)
        drawn["mean_recall"] = drawn["rsum"] / 6
    return drawn


class _Queries:
    """The queries of one direction: sums over those of each image, and their ranks in order."""

    def __init__(self, values: Values, cluster: np.ndarray, images: int):
        """cluster (queries,) is the number of each query's image, from 0 to images - 1."""
        means = [name for name in values if name != MEDIAN]
        columns = [*(values[name] for name in means), np.ones(len(cluster))]
        self.names = means + [MEDIAN] * (MEDIAN in values)
        self.sums = np.stack([np.bincount(cluster, column, images) for column in columns], axis=1)
        if MEDIAN in values:
            order = np.argsort(values[MEDIAN], kind="stable")
            self.cluster, self.ranks = cluster[order], values[MEDIAN][order]

    def report(self, weights: np.ndarray) -> np.ndarray:
        """The figures, (samples, names), for int64 weights (samples, images)."""
        sums = weights @ self.sums
        counts = sums[:, -1:]
        means = np.divide(sums[:, :-1], counts, out=np.full_like(sums[:, :-1], np.nan), where=counts > 0)
        if MEDIAN not in self.names:
            return means
        # the median is the mean of the two middle ranks, which are equal for an odd number of queries
        before = weights[:, self.cluster].cumsum(axis=1)
        total = before[:, -1:]
        middle = [self.ranks[(before > position).argmax(axis=1)] for position in ((total - 1) // 2, total // 2)]
        median = np.where(total[:, 0] > 0, (middle[0] + middle[1]) / 2, np.nan)
        return np.column_stack([means, median])
