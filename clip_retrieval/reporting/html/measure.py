"""The numbers behind a report: ranks, exact top items and similarities of every query, in both directions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, from_numpy

from clip_retrieval.evaluation.metrics import expected_ranks
from clip_retrieval.evaluation.neighbours import nearest
from clip_retrieval.evaluation.ranks import Ranks
from clip_retrieval.evaluation.scores import Features, exact_scores, scoring_device

TOP = 10  # items of a query; a report shows the first five
RANDOM_PAIRS = 50_000
SEED = 0


@dataclass(frozen=True)
class Direction:
    """One direction, with a row for each query that has a relevant item, in index order. k is at most TOP.

    Attributes:
        ranks: the counts that determine the rank of each query.
        rank: float64 (queries,), the expected rank of the first relevant item.
        items: int64 (queries, k), the top items, best first.
        relevant: bool (queries, k), whether they match the query.
        best: int64 (queries,), the relevant item with the highest cosine.
        best_score: float64 (queries,), its cosine.
        hardest: float64 (queries,), the cosine of the best negative among the top items; NaN if there is none.
        features: those of the queries and of the items.
    """

    ranks: Ranks
    rank: np.ndarray
    items: np.ndarray
    relevant: np.ndarray
    best: np.ndarray
    best_score: np.ndarray
    hardest: np.ndarray
    features: tuple[Features, Features]

    def scores(self, row: int) -> np.ndarray:
        """The cosines of the top items of one query, float64 (k,)."""
        top = self.items[row]
        return score_pairs(*self.features, np.stack([np.full_like(top, self.ranks.queries[row]), top], axis=1))

    @property
    def right(self) -> np.ndarray:
        """bool (queries,): no negative scores as high as the best relevant item."""
        return self.rank == 1


@dataclass(frozen=True)
class Measured:
    """Both directions, and the cosines of all relevant pairs and of random other pairs, float64 (pairs,)."""

    i2t: Direction
    t2i: Direction
    positives: np.ndarray
    negatives: np.ndarray


def measure(image_features: Tensor, caption_features: Tensor, pairs: np.ndarray, i2t: Ranks, t2i: Ranks) -> Measured:
    """Find the top items of all queries.

    Args:
        image_features: (images, dim), L2-normalised.
        caption_features: (captions, dim), likewise.
        pairs: int64 (P, 2), the distinct relevant (image index, caption index), at least one.
        i2t, t2i: the ranks of both directions.
    """
    device = scoring_device(image_features, None)
    images = Features(image_features, device, "image", str)
    captions = Features(caption_features, device, "caption", str)
    neighbours = nearest(images, captions, TOP)
    positives = score_pairs(images, captions, pairs)
    reverse = pairs[:, ::-1]
    random = np.random.default_rng(SEED).integers(0, (len(images), len(captions)), (RANDOM_PAIRS, 2))
    random = random[~contains(pairs, random[:, 0], random[:, 1])]
    return Measured(
        _measure_direction(images, captions, pairs, positives, i2t, neighbours["i2t"].items),
        _measure_direction(captions, images, reverse, positives, t2i, neighbours["t2i"].items),
        positives,
        score_pairs(images, captions, random),
    )


def _measure_direction(
    queries: Features, items: Features, pairs: np.ndarray, positives: np.ndarray, ranks: Ranks, top: np.ndarray
) -> Direction:
    """pairs (P, 2) are the relevant (query, item), positives (P,) their scores, top (queries, k) the top items."""
    # the best relevant item of each query
    order = np.lexsort((-positives, pairs[:, 0]))
    rows, best = ranks.queries, order[np.unique(pairs[order, 0], return_index=True)[1]]
    # the top items, and the first negative among them
    top = top[rows]
    relevant = contains(pairs, np.repeat(rows, top.shape[1]), top.ravel()).reshape(top.shape)
    hardest = np.full(len(rows), np.nan)
    negative = np.flatnonzero(~relevant.all(axis=1))
    first = top[negative, (~relevant[negative]).argmax(axis=1)]
    hardest[negative] = score_pairs(queries, items, np.stack([rows[negative], first], axis=1))
    features = queries, items
    return Direction(ranks, expected_ranks(ranks), top, relevant, pairs[best, 1], positives[best], hardest, features)


def score_pairs(left: Features, right: Features, pairs: np.ndarray) -> np.ndarray:
    """Compute the scores of (left, right) index pairs (n, 2), float64 (n,)."""
    i, j = (from_numpy(pairs[:, side].copy()).to(left.norms.device) for side in (0, 1))
    return exact_scores(left, i, right, j).cpu().numpy()


def contains(pairs: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Whether each (left, right) pair is one of `pairs`, bool (n,)."""
    width = 1 + max(pairs[:, 1].max(initial=0), right.max(initial=0))
    return np.isin(left * width + right, pairs[:, 0] * width + pairs[:, 1])
