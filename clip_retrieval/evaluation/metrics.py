"""Recall and ranks in numbers: what a set of `Ranks` is worth. Percent, and ranks that start at 1.

Tied items are taken in a random order and every number is the expectation over it, computed exactly: a model that
gives all items the same score gets chance, and the order of the files changes nothing.
"""

from collections.abc import Iterable

import numpy as np

from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.ranks import Ranks

STANDARD_K = (1, 5, 10)


def recall_at(ranks: Ranks, k: int) -> float:
    """Percent of queries with any relevant item among their first k.

    k - above places are left for the tied items, of which `positives` are relevant; the query misses when none of
    these places goes to one: C(tied, places) / C(tied + positives, places) of the orders.
    """
    places = min(k, np.iinfo(np.int64).max) - ranks.above
    hit = (places > ranks.tied).astype(np.float64)
    open_ = (places > 0) & (places <= ranks.tied)
    places, tied, positives = places[open_], ranks.tied[open_], ranks.positives[open_]
    miss = np.ones(len(places))
    # The quotient of the two binomials, a factor a place: nothing overflows, however many items are tied.
    for place in range(places.max(initial=0)):
        miss *= np.divide(tied - place, tied + positives - place, out=np.ones_like(miss), where=place < places)
    hit[open_] = 1 - miss
    return 100 * float(hit.mean())


def expected_ranks(ranks: Ranks) -> np.ndarray:
    """Rank of each query's first relevant item, (queries,) float64: 1 + the negatives before it."""
    return 1 + ranks.above + ranks.tied / (ranks.positives + 1)


def retrieval_metrics(ranks: Ranks, recall_k: Iterable[int] = STANDARD_K) -> dict[str, float]:
    """{"R@1", "R@5", "R@10", further "R@K" of recall_k in numeric order, "MedR", "MeanR"} of one direction.

    Raises UserError for a K below 1.
    """
    wanted = sorted({*STANDARD_K, *recall_k})
    if wanted[0] < 1:
        raise UserError(f"recall at {wanted[0]} has no meaning: K starts at 1")
    metrics = {f"R@{k}": recall_at(ranks, k) for k in wanted}
    expected = expected_ranks(ranks)
    return metrics | {"MedR": float(np.median(expected)), "MeanR": float(expected.mean())}


def report(i2t: Ranks, t2i: Ranks, recall_k: Iterable[int] = STANDARD_K) -> dict:
    """Both directions: {"i2t": {...}, "t2i": {...}, "mean_recall", "rsum"}, all plain numbers.

    mean_recall and rsum are the mean and the sum of the six R@1, R@5 and R@10, whatever further K are asked for.
    """
    blocks = {name: retrieval_metrics(ranks, recall_k) for name, ranks in (("i2t", i2t), ("t2i", t2i))}
    rsum = sum(block[f"R@{k}"] for block in blocks.values() for k in STANDARD_K)
    return {**blocks, "mean_recall": rsum / 6, "rsum": rsum}
