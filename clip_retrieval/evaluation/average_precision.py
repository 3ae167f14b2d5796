"""Mean average precision at K (mAP@K) and at R, and R-Precision, in percent, from the exact top items of every query.

The average precision at K of a query with R relevant items is the sum of the precisions at those places up to K that
hold a relevant item, divided by min(K, R), so a perfect order scores 100. (Some implementations divide by the number of
relevant items retrieved, which gives 100 to a query with only one of its five relevant items, at the first place.)

With R = the number of relevant items of a query, R-Precision is the share of relevant items among its first R, and
mAP@R is the mean over these R places of the precision there, counted as 0 if the item is not relevant (Musgrave et al.,
A Metric Learning Reality Check, arXiv:2003.08505).

As for recall, the value is the expectation over a random order of equal items. Let n items tie, r of them relevant, and
let a relevant items be above them. The j-th tied place holds a relevant item in r / n of the orders, and then
a + 1 + (j - 1) (r - 1) / (n - 1) of the items up to it are relevant on average (McSherry and Najork, Computing
information retrieval performance measures efficiently in the presence of tied scores, ECIR 2008).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.evaluation.metrics import STANDARD_K
from clip_retrieval.evaluation.neighbours import Neighbours, nearest
from clip_retrieval.evaluation.scores import TIE, Features, exact_scores, scoring_device


def average_precisions(
    image_features: Tensor | np.ndarray,
    text_features: Tensor | np.ndarray,
    pairs: Tensor | np.ndarray,
    ks: Iterable[int] = STANDARD_K,
    *,
    device: torch.device | str | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, dict[str, np.ndarray]]:
    """Compute {"i2t": {"mAP@1": percent (queries,), ...}, "t2i": {...}} of the queries with a relevant item, in order.

    Their means are the mAP. The arguments are those of `ranks.retrieval_ranks`, which validates them: features
    (images, dim) and (captions, dim), and the relevant pairs (P, 2) of (image index, caption index).
    """
    ks = sorted(set(ks))
    device = scoring_device(image_features, device)
    images, texts = Features(image_features, device, "image", str), Features(text_features, device, "caption", str)
    neighbours = nearest(images, texts, ks[-1], processes=processes)
    image, text = np.unique(torch.as_tensor(pairs).cpu().numpy(), axis=0).T
    return {
        "i2t": _average_precisions(neighbours["i2t"], images, texts, image, text, ks),
        "t2i": _average_precisions(neighbours["t2i"], texts, images, text, image, ks),
    }


def _average_precisions(
    neighbours: Neighbours, queries: Features, items: Features, query: np.ndarray, item: np.ndarray, ks: list[int]
) -> dict[str, np.ndarray]:
    """{"mAP@K": percent (queries,)}; query, item (P,) are the distinct relevant pairs."""
    relevant = np.bincount(query, minlength=len(queries))
    _, precisions = _expected_hits(neighbours, queries, items, query, item)
    # the queries with a relevant item
    precisions = precisions[relevant > 0].cumsum(axis=1)
    relevant = relevant[relevant > 0]
    last = precisions.shape[1] - 1  # the gallery may be smaller than K
    return {f"mAP@{k}": 100 * precisions[:, min(k - 1, last)] / np.minimum(k, relevant) for k in ks}


def precisions_at_r(
    queries: Features,
    items: Features,
    query: np.ndarray,
    item: np.ndarray,
    relevant: np.ndarray,
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, np.ndarray]:
    """Compute {"R-P", "mAP@R"} of each query of one direction, percent (queries,); NaN without a relevant item.

    query, item (P,) are the distinct relevant pairs; relevant (queries,) is R of each query, with relevant items that
    are not in the gallery. Memory grows with the pairs: queries with about as many are ranked at a time.
    """
    size = np.ceil(np.log2(np.maximum(relevant, 1))).astype(int)
    values = np.full((2, len(queries)), np.nan)
    for exponent in np.unique(size[relevant > 0]):
        # the exact top items of these queries, as many as the largest R
        rows = np.flatnonzero((size == exponent) & (relevant > 0))
        device = queries.norms.device
        some = Features(queries.features[torch.from_numpy(rows).to(device)], device, queries.kind, str)
        k = min(int(relevant[rows].max()), len(items))
        neighbours = nearest(some, items, k, directions=["i2t"], processes=processes)["i2t"]
        # count the places up to each query's own R
        own = np.isin(query, rows)
        found = _expected_hits(neighbours, some, items, np.searchsorted(rows, query[own]), item[own])
        within = np.arange(k) < relevant[rows, None]
        values[:, rows] = [100 * (part * within).sum(axis=1) / relevant[rows] for part in found]
    return dict(zip(("R-P", "mAP@R"), values))


def _expected_hits(
    neighbours: Neighbours, queries: Features, items: Features, query: np.ndarray, item: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The chance that a place holds a relevant item, and the expected precision there (0 if it does not).

    Both are float64 (queries, k); query, item (P,) are the distinct relevant pairs.
    """
    # count the relevant items of each group of equal items, with those beyond the k
    hits = _is_relevant(neighbours.items, np.sort(query * len(items) + item), len(items))
    group_hits = np.zeros(neighbours.items.shape, np.int64)
    np.add.at(group_hits, (np.arange(len(hits))[:, None], neighbours.begin), hits)
    rows = _find_unlisted_ties(neighbours, queries, items, query, item)
    np.add.at(group_hits, (rows, neighbours.begin[rows, -1]), 1)
    # the expectation over the orders of each group
    begin = neighbours.begin
    row = np.arange(len(begin))[:, None]
    above = group_hits.cumsum(axis=1) - group_hits
    above, group = above[row, begin], group_hits[row, begin]
    size = np.zeros_like(begin)
    np.add.at(size, (row, begin), 1)
    size[row[:, 0], begin[:, -1]] = neighbours.size
    size = size[row, begin]
    place = np.arange(begin.shape[1])
    relevant_so_far = above + 1 + (place - begin) * (group - 1) / np.maximum(size - 1, 1)
    return group / size, group / size * relevant_so_far / (place + 1)


def _is_relevant(items: np.ndarray, keys: np.ndarray, count: int) -> np.ndarray:
    """bool (queries, k): which items are relevant. keys (P,) is the sorted query * count + item, for `count` items."""
    candidates = np.arange(len(items))[:, None] * count + items
    index = np.searchsorted(keys, candidates).clip(max=len(keys) - 1)
    return keys[index] == candidates


def _find_unlisted_ties(
    neighbours: Neighbours, queries: Features, items: Features, query: np.ndarray, item: np.ndarray
) -> np.ndarray:
    """The query of each relevant item that ties with the query's last group but is beyond the k."""
    cut = neighbours.begin[:, -1] + neighbours.size > neighbours.items.shape[1]
    query, item = query[cut[query]], item[cut[query]]
    unlisted = ~(neighbours.items[query] == item[:, None]).any(axis=1)
    query, item = query[unlisted], item[unlisted]
    if len(query) == 0:
        return query
    device = queries.norms.device
    q, i, leader = (torch.from_numpy(part).to(device) for part in (query, item, neighbours.leader[query]))
    gap = exact_scores(queries, q, items, i) - exact_scores(queries, q, items, leader)
    equal = gap.abs() <= TIE * queries.norms[q] * torch.maximum(items.norms[i], items.norms[leader])
    return query[equal.cpu().numpy()]
