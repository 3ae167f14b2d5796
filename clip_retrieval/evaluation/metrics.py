"""Recall in percent, and median and mean rank (ranks start at 1), from `Ranks`.

Every value is the exact expectation over a random order of tied items: a model that gives all items the same score gets
chance, and the order of the files changes nothing.
"""

from collections.abc import Iterable

import numpy as np

from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.ranks import Ranks

STANDARD_K = (1, 5, 10)


def recall_at(ranks: Ranks, k: int) -> float:
    """Percent of queries with at least one relevant item among their first k."""
    return 100 * float(hit_chances(ranks, k).mean())


def hit_chances(ranks: Ranks, k: int) -> np.ndarray:
    """The chance that a query has a relevant item among its first k, float64 (queries,): 0 or 1 unless items tie.

    k - above places are left for the equal items: `tied` negatives and `positives` relevant ones. A query misses if
    none of these places holds a relevant item, in C(tied, places) / C(tied + positives, places) of the orders.
    """
    places = min(k, np.iinfo(np.int64).max) - ranks.above
    hit = (places > ranks.tied).astype(np.float64)
    undecided = (places > 0) & (places <= ranks.tied)
    places, tied, positives = places[undecided], ranks.tied[undecided], ranks.positives[undecided]
    miss = np.ones(len(places))
    # The quotient of the binomials as one factor per place, which cannot overflow.
    for place in range(places.max(initial=0)):
        miss *= np.divide(tied - place, tied + positives - place, out=np.ones_like(miss), where=place < places)
    hit[undecided] = 1 - miss
    return hit


def expected_ranks(ranks: Ranks) -> np.ndarray:
    """Expected rank of each query's first relevant item, float64 (queries,): 1 + the negatives before it."""
    return 1 + ranks.above + ranks.tied / (ranks.positives + 1)


def retrieval_metrics(ranks: Ranks, recall_k: Iterable[int] = STANDARD_K) -> dict[str, float]:
    """Compute {"R@1", "R@5", "R@10", "MedR", "MeanR"} of one direction, and "R@K" for further recall_k, K ascending.

    Raises UserError if a K is below 1.
    """
    ks = sorted({*STANDARD_K, *recall_k})
    if ks[0] < 1:
        raise UserError(f"recall at {ks[0]}: K must be at least 1")
    metrics = {f"R@{k}": recall_at(ranks, k) for k in ks}
    expected = expected_ranks(ranks)
    return metrics | {"MedR": float(np.median(expected)), "MeanR": float(expected.mean())}


def report(i2t: Ranks, t2i: Ranks, recall_k: Iterable[int] = STANDARD_K) -> dict:
    """Compute the metrics of both directions: {"i2t": {...}, "t2i": {...}, "mean_recall", "rsum"}, plain numbers.

    mean_recall and rsum are the mean and the sum of the six R@1, R@5 and R@10, without further K of recall_k.
    """
    blocks = {name: retrieval_metrics(ranks, recall_k) for name, ranks in (("i2t", i2t), ("t2i", t2i))}
    rsum = sum(block[f"R@{k}"] for block in blocks.values() for k in STANDARD_K)
    return {**blocks, "mean_recall": rsum / 6, "rsum": rsum}
