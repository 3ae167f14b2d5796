"""Mean average precision at K (mAP@K), in percent, of both directions, from the exact first items of every query.

The average precision at K of a query with R relevant items is the sum, over the places up to K that hold one, of the
precision at that place, divided by min(K, R): what a perfect order has is 100. (Some divide by the relevant items
found instead, which gives 100 to a query that finds one of its five at the first place.)

Equal items are taken in a random order, and the value is the expectation over it, as that of recall: with n tied
items, r of them relevant, and a relevant ones above, the j-th tied place holds a relevant item in r / n of the orders,
and then a + 1 + (j - 1) (r - 1) / (n - 1) of the items up to it are relevant on average (McSherry and Najork,
Computing information retrieval performance measures efficiently in the presence of tied scores, ECIR 2008).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.evaluation.metrics import STANDARD_K
from clip_retrieval.evaluation.neighbours import Neighbours, nearest
from clip_retrieval.evaluation.ranks import TIE
from clip_retrieval.evaluation.scores import Features, exact_scores, scoring_device


def retrieval_map(
    image_features: Tensor | np.ndarray,
    text_features: Tensor | np.ndarray,
    pairs: Tensor | np.ndarray,
    ks: Iterable[int] = STANDARD_K,
    *,
    device: torch.device | str | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, dict[str, float]]:
    """{"i2t": {"mAP@1": percent, ...}, "t2i": {...}} over all queries with a relevant item.

    Takes what `ranks.retrieval_ranks` takes, and has checked: features (images, dim) and (captions, dim), and pairs
    (P, 2) of (image index, caption index) that are relevant.
    """
    ks = sorted(set(ks))
    device = scoring_device(image_features, device)
    images, texts = Features(image_features, device, "image", str), Features(text_features, device, "caption", str)
    found = nearest(images, texts, ks[-1], processes=processes)
    image, text = np.unique(torch.as_tensor(pairs).cpu().numpy(), axis=0).T
    return {
        "i2t": _percent(found["i2t"], images, texts, image, text, ks),
        "t2i": _percent(found["t2i"], texts, images, text, image, ks),
    }


def _percent(
    found: Neighbours, queries: Features, items: Features, query: np.ndarray, item: np.ndarray, ks: list[int]
) -> dict[str, float]:
    """{"mAP@K": percent}; query, item (P,) are the relevant pairs, each once."""
    relevant = np.bincount(query, minlength=len(queries))
    hits = _is_listed(found.items, np.sort(query * len(items) + item), len(items))
    in_group = _hits_by_group(found, hits)
    rows, ties = _cut_off_ties(found, queries, items, query, item)
    np.add.at(in_group, (rows, found.begin[rows, -1]), ties)
    places = expected_precisions(found, in_group)[relevant > 0].cumsum(axis=1)
    relevant = relevant[relevant > 0]
    values = {}
    for k in ks:
        reached = min(k, places.shape[1])  # a gallery smaller than K
        values[f"mAP@{k}"] = 100 * float((places[:, reached - 1] / np.minimum(k, relevant)).mean())
    return values


def expected_precisions(found: Neighbours, in_group: np.ndarray) -> np.ndarray:
    """(queries, k) float64: at each place, the expectation of its precision, or of 0 where the item is irrelevant.

    in_group (queries, k) is the number of relevant items in the group of equal items that begins at a place.
    """
    rows = np.arange(len(found.items))[:, None]
    above = in_group.cumsum(axis=1) - in_group
    above, group = above[rows, found.begin], in_group[rows, found.begin]
    size = np.zeros_like(found.begin)
    np.add.at(size, (rows, found.begin), 1)
    size[rows[:, 0], found.begin[:, -1]] = found.size
    size = size[rows, found.begin]
    place = np.arange(found.items.shape[1])
    before = place - found.begin
    in_order = above + 1 + before * (group - 1) / np.maximum(size - 1, 1)
    return group / size * in_order / (place + 1)


def _is_listed(found: np.ndarray, keys: np.ndarray, items: int) -> np.ndarray:
    """bool (queries, k): which of the found items are relevant; keys (P,) are query * items + item, sorted."""
    wanted = np.arange(len(found))[:, None] * items + found
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return keys[at] == wanted


def _hits_by_group(found: Neighbours, hits: np.ndarray) -> np.ndarray:
    """int64 (queries, k): the relevant items that are listed of the group that begins at a place."""
    in_group = np.zeros(found.items.shape, np.int64)
    np.add.at(in_group, (np.arange(len(hits))[:, None], found.begin), hits)
    return in_group


def _cut_off_ties(
    found: Neighbours, queries: Features, items: Features, query: np.ndarray, item: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(query, 1) for each relevant item that belongs to the last group of its query and is cut off by the k."""
    cut = found.begin[:, -1] + found.size > found.items.shape[1]
    query, item = query[cut[query]], item[cut[query]]
    unlisted = ~(found.items[query] == item[:, None]).any(axis=1)
    query, item = query[unlisted], item[unlisted]
    if len(query) == 0:
        return query, query
    device = queries.norms.device
    q, i, leader = (torch.from_numpy(part).to(device) for part in (query, item, found.leader[query]))
    gap = exact_scores(queries, q, items, i) - exact_scores(queries, q, items, leader)
    equal = gap.abs() <= TIE * queries.norms[q] * torch.maximum(items.norms[i], items.norms[leader])
    query = query[equal.cpu().numpy()]
    return query, np.ones_like(query)
