"""Percentile bootstrap of recall and ranks, over images.

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


def bootstrap_intervals(
    i2t: Ranks,
    t2i: Ranks,
    pairs: np.ndarray,
    recall_k: Iterable[int] = STANDARD_K,
    *,
    samples: int = SAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute the interval [low, high] of each figure of `metrics.report`, in its structure and units.

    Args:
        i2t, t2i: the ranks of both directions.
        pairs: the relevant (image index, caption index), (P, 2).
        recall_k: further K besides 1, 5 and 10.
        samples: number of bootstrap samples.
        level: share of the samples within the interval.
        seed: of the samples.
    """
    drawn = bootstrap_report(i2t, t2i, first_images(pairs, t2i.queries), recall_k, samples=samples, seed=seed)
    return {
        name: {metric: interval(value, level) for metric, value in values.items()}
        if isinstance(values, dict)
        else interval(values, level)
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


def bootstrap_report(
    i2t: Ranks,
    t2i: Ranks,
    first_image: np.ndarray,
    recall_k: Iterable[int] = STANDARD_K,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute `metrics.report` of each sample: its structure, with float64 (samples,) instead of numbers.

    Two models that are scored on the same queries get the same samples, so their differences are paired. first_image
    (t2i queries,) is the image with which each caption is drawn. A sample without any caption has NaN.
    """
    # number the images; add up the values of the queries of each
    ks = sorted({*STANDARD_K, *recall_k})
    images, cluster = np.unique(np.concatenate([i2t.queries, first_image]), return_inverse=True)
    sides = {"i2t": _Queries(i2t, cluster[: len(i2t.queries)], len(images), ks)}
    sides["t2i"] = _Queries(t2i, cluster[len(i2t.queries) :], len(images), ks)

    # draw the images of some samples at a time
    rng = np.random.default_rng(seed)
    chunk = max(1, CELLS // len(cluster))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in sides}
    for start in range(0, samples, chunk):
        count = min(chunk, samples - start)
        cells = rng.integers(len(images), size=(count, len(images))) + np.arange(count)[:, None] * len(images)
        weights = np.bincount(cells.ravel(), minlength=cells.size).reshape(cells.shape)
        for name, side in sides.items():
            parts[name].append(side.report(weights))

    # name the columns
    names = [*(f"R@{k}" for k in ks), "MeanR", "MedR"]
    report: dict[str, Any] = {name: dict(zip(names, np.concatenate(rows).T)) for name, rows in parts.items()}
    report["rsum"] = sum(report[name][f"R@{k}"] for name in sides for k in STANDARD_K)
    return report | {"mean_recall": report["rsum"] / 6}


class _Queries:
    """The queries of one direction: sums over those of each image, and their ranks in order."""

    def __init__(self, ranks: Ranks, cluster: np.ndarray, images: int, ks: list[int]):
        """cluster (queries,) is the number of each query's image, from 0 to images - 1."""
        expected = expected_ranks(ranks)
        values = [*(100 * hit_chances(ranks, k) for k in ks), expected, np.ones(len(expected))]
        self.sums = np.stack([np.bincount(cluster, value, images) for value in values], axis=1)
        order = np.argsort(expected, kind="stable")
        self.cluster, self.expected = cluster[order], expected[order]

    def report(self, weights: np.ndarray) -> np.ndarray:
        """The means of the values, and the median rank, (samples, values + 1), for int64 weights (samples, images)."""
        sums = weights @ self.sums
        counts = sums[:, -1:]
        means = np.divide(sums[:, :-1], counts, out=np.full_like(sums[:, :-1], np.nan), where=counts > 0)
        # the median is the mean of the two middle ranks, which are equal for an odd number of queries
        before = weights[:, self.cluster].cumsum(axis=1)
        total = before[:, -1:]
        middle = [self.expected[(before > position).argmax(axis=1)] for position in ((total - 1) // 2, total // 2)]
        median = np.where(total[:, 0] > 0, (middle[0] + middle[1]) / 2, np.nan)
        return np.column_stack([means, median])
