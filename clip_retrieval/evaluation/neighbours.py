"""The k best items of every query, exactly, in either direction, from one pass over tiles of scores.

    found = nearest(images, texts, 10)
    found["t2i"].items  # image indices (captions, 10), best first

The order is that of float64 inner products of the features as given. As in `ranks`, scores are equal when they differ
by at most 1e-10 |query| |item| (of the longer item): the best item that is left leads, all that are equal to it come
with it, in the order of the items, and so on. So neither tiles nor the device nor rounding decide an order.

A float32 product filters. Its error is within a proven bound m (`rounding_bound`), so k items that score at least s
there have s - m or more, and an item below s - 2 m (and the tie tolerance) is neither among the k best nor equal to
one of them. What is left, k items a query and few more, is sorted; where two that follow each other are closer than
the bound can tell, float64 decides.

Memory grows with queries times k, and a few tiles. A query with more undecided items than that (features that all
look alike) gets its whole row in float64, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.ranks import TIE
from clip_retrieval.evaluation.scores import Features, exact_scores, fast_tiles, rounding_bound, tile_size

DIRECTIONS = ("i2t", "t2i")
COLLECTED = 2**20  # candidates, in one direction, after which those are dropped that have become hopeless
CROWD = 64  # candidates beyond twice k that make a query crowded
DENSE = 2**20  # float64 scores that are settled at a time


@dataclass(frozen=True)
class Neighbours:
    """The first items of each query: arrays of shape (queries, k), int64, best first.

    k is at most the number of items. The last group of equal items may be cut by the k: leader and size tell of it.
    """

    items: np.ndarray
    """Item indices."""
    begin: np.ndarray
    """Place, from 0, at which the group of equal items begins that each of them belongs to."""
    leader: np.ndarray
    """(queries,) An item of the last group, the one that the others are equal to."""
    size: np.ndarray
    """(queries,) How many items are in the last group, with those that are cut off."""


@torch.no_grad()
def nearest(
    images: Features,
    texts: Features,
    k: int,
    *,
    directions: Collection[str] = DIRECTIONS,
    tile: tuple[int, int] | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, Neighbours]:
    """The k best captions of each image ("i2t") and the k best images of each caption ("t2i").

    tile: images x captions that are scored at a time, for speed only. processes: those that share the tiles between
    them; each gives all features, and gets all neighbours.

    Raises UserError for a k below 1 and for features of different length.
    """
    if k < 1:
        raise UserError(f"the first {k} have no meaning: k starts at 1")
    if images.dim != texts.dim:
        raise UserError(
            f"image features have {images.dim} dimensions and text features {texts.dim}: they must be equal"
        )
    sides = {"i2t": (images, texts), "t2i": (texts, images)}
    found = {name: _Direction(*sides[name], k) for name in directions}
    none = torch.empty(0, dtype=torch.int64, device=images.norms.device)
    deal = slice(processes.rank, None, processes.world_size)
    for part in fast_tiles(images, texts, none, none, tile or tile_size(none.device), deal):
        if "i2t" in found:
            found["i2t"].take(part.rows, part.columns, part.scores)
        if "t2i" in found:
            found["t2i"].take(part.columns, part.rows, part.scores.T)
    return {name: direction.neighbours(processes) for name, direction in found.items()}


class _Direction:
    """One direction: for each query the items that may be among its first k.

    best (queries, k) are float32 scores that k different items reach; low (queries,) what a score must reach to be
    of interest, so infinity for a query that is `crowded`: it is settled by its whole row.
    """

    def __init__(self, queries: Features, items: Features, k: int):
        self.queries, self.items, self.k = queries, items, min(k, len(items))
        relative, absolute = rounding_bound(queries.dim)
        # Twice the tie tolerance: once for the tie rule, once for the last bits of the float64 scores themselves.
        margin = queries.norms * items.norms.max() * (relative + 2 * TIE) + absolute
        self.slack = 2 * margin
        self.best = torch.full((len(queries), self.k), -torch.inf, device=margin.device)
        self.low = self.best[:, 0].clone()
        self.crowded = torch.zeros_like(self.low, dtype=torch.int64)
        self.candidates = [(self.crowded[:0], self.crowded[:0], self.low[:0])]  # (query, item, float32 score)
        self.collected = 0

    def take(self, queries: slice, items: slice, fast: Tensor) -> None:
        """Takes the candidates of a tile by its float32 scores, fast (queries, items).

        The items are dealt to a few groups, neighbours to different ones. A look at the best of each group tells
        what the k best so far reach at least, and which groups hold candidates.
        """
        groups = min(fast.shape[1], max(64, 4 * self.k))
        maxima = _group_maxima(fast, groups)
        promising = (maxima.amax(1) >= self.low[queries]).nonzero()[:, 0]
        if len(promising) == 0:
            return
        maxima, rows = maxima[promising], promising + queries.start
        best = torch.cat([self.best[rows], maxima], 1).topk(self.k).values
        self.best[rows] = best
        low = _rounded_down(best[:, -1] - self.slack[rows])
        self.low[rows] = low
        row, group = (maxima >= low[:, None]).nonzero(as_tuple=True)
        column = group[:, None] + torch.arange(0, fast.shape[1], groups, device=group.device)
        inside = column < fast.shape[1]
        scores = fast[promising[row][:, None], column.clamp(max=fast.shape[1] - 1)]
        hit, step = (inside & (scores >= low[row][:, None])).nonzero(as_tuple=True)
        self.candidates.append((rows[row[hit]], column[hit, step] + items.start, scores[hit, step]))
        self.collected += len(hit)
        if self.collected > max(COLLECTED, 4 * self.best.numel()):
            self._drop_hopeless()

    def _drop_hopeless(self) -> None:
        query, item, score = _together(self.candidates)
        keep = score >= self.low[query]
        overfull = torch.bincount(query[keep], minlength=len(self.low)) > 2 * self.k + CROWD
        self.low[overfull] = torch.inf
        self.crowded[overfull] = 1
        keep &= ~overfull[query]
        self.candidates = [(query[keep], item[keep], score[keep])]
        self.collected = len(self.candidates[0][0])

    def neighbours(self, processes: Processes) -> Neighbours:
        """What all tiles gave, of all processes."""
        self._drop_hopeless()
        crowded = processes.max(self.crowded) > 0
        candidates = [processes.all_gather_rows(part) for part in self.candidates[0]]
        settled = _ExactNeighbours(self.queries, self.items, self.k)
        settled.settle_candidates(*(part[~crowded[candidates[0]]] for part in candidates), self.slack)
        settled.settle_rows(crowded.nonzero()[:, 0])
        return settled.neighbours()


def _rounded_down(scores: Tensor) -> Tensor:
    """float64 scores in float32, the next smaller number."""
    return torch.nextafter(scores.float(), torch.tensor(-torch.inf, device=scores.device))


def _group_maxima(fast: Tensor, groups: int) -> Tensor:
    """The best score of each group, (queries, groups): item i is in group i % groups."""
    maxima = fast[:, :groups].clone()
    for start in range(groups, fast.shape[1], groups):
        part = fast[:, start : start + groups]
        best = maxima[:, : part.shape[1]]
        torch.maximum(best, part, out=best)
    return maxima


def _together(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(tensors) for tensors in zip(*parts))


class _ExactNeighbours:
    """The order of the first k items of each query, as it is being found."""

    def __init__(self, queries: Features, items: Features, k: int):
        self.queries, self.items, self.k = queries, items, k
        self.first = torch.full((len(queries), k), -1, device=queries.norms.device)
        self.begin = torch.arange(k, device=self.first.device).repeat(len(queries), 1)
        self.leader = self.first[:, 0].clone()
        self.size = torch.ones_like(self.leader)

    def settle_candidates(self, query: Tensor, item: Tensor, score: Tensor, slack: Tensor) -> None:
        """Order candidates (n,), all that matter of their queries, by float32 scores where these can tell.

        Scores of one query that follow each other within its slack make a run: float64 decides within it.
        """
        order = score.argsort(descending=True)
        order = order[query[order].argsort(stable=True)]
        query, item, score = query[order], item[order], score[order]
        index = torch.arange(len(query), device=query.device)
        starts = torch.ones_like(index, dtype=torch.bool)
        starts[1:] = (query[1:] != query[:-1]) | (score[:-1].double() - score[1:] > slack[query[1:]])
        count = torch.bincount(query, minlength=len(self.queries))
        place = index - (count.cumsum(0) - count)[query]
        run = starts.cumsum(0) - 1
        begin, length = place[starts][run], torch.bincount(run)[run]
        matters = begin < self.k
        alone = matters & (length == 1)
        self.first[query[alone], place[alone]] = item[alone]
        last = alone & (place == self.k - 1)
        self.leader[query[last]] = item[last]
        close = matters & (length > 1)
        query, item, run, begin = query[close], item[close], run[close], begin[close]
        exact = exact_scores(self.queries, query, self.items, item) if len(query) else score[:0].double()
        self._settle_runs(run, query, item, exact, begin)

    def settle_rows(self, queries: Tensor) -> None:
        """Order the first items of these queries (n,) by their scores with all items."""
        if len(queries) == 0:
            return
        longest = self.items.norms.max()
        for rows in queries.split(max(1, 4 * DENSE // len(self.items))):
            exact = torch.empty(len(rows), len(self.items), dtype=torch.float64, device=rows.device)
            left, step = self.queries.exact(rows), self.items.chunk()
            for start in range(0, len(self.items), step):
                columns = slice(start, start + step)
                torch.mm(left, self.items.exact(columns).T, out=exact[:, columns])
            few = max(1, DENSE // len(self.items))  # all of their items may be equal
            for some, scores in zip(rows.split(few), exact.split(few)):
                equal = 2 * TIE * self.queries.norms[some] * longest
                low = scores.topk(self.k).values[:, -1] - equal
                run, item = (scores >= low[:, None]).nonzero(as_tuple=True)
                self._settle_runs(run, some[run], item, scores[run, item], torch.zeros_like(run))

    def _settle_runs(self, run: Tensor, query: Tensor, item: Tensor, exact: Tensor, begin: Tensor) -> None:
        """Order runs of candidates: all tensors (n,), sorted by run; exact are float64 scores, begin first places."""
        if len(run) == 0:
            return
        run = torch.unique_consecutive(run, return_inverse=True)[1]
        order = (run * len(self.items) + item).argsort()  # within a run in the order of the items
        query, item, exact, begin = (part[order] for part in (query, item, exact, begin))
        length = torch.bincount(run)
        starts = length.cumsum(0) - length
        position = torch.arange(len(run), device=run.device) - starts[run]
        for first, end in _chunks(length.tolist()):
            part = slice(int(starts[first]), int(starts[end - 1] + length[end - 1]))
            shape = end - first, int(length[first:end].max())
            cell = run[part] - first, position[part]
            scores = torch.full(shape, -torch.inf, dtype=torch.float64, device=run.device)
            items = torch.zeros(shape, dtype=torch.int64, device=run.device)
            scores[cell], items[cell] = exact[part], item[part]
            heads = starts[first:end]
            self._place(query[heads], begin[heads], items, scores)

    def _place(self, query: Tensor, filled: Tensor, items: Tensor, scores: Tensor) -> None:
        """Give items (n, m), whose order is theirs, the places of queries (n,) from `filled` (n,) on.

        scores (n, m) is float64, -inf where there is no item; it is used up.
        """
        norms = self.items.norms[items]
        while True:
            best, leader = scores.max(1)
            open_ = (filled < self.k) & (best > -torch.inf)
            if not open_.any():
                return
            tolerance = TIE * self.queries.norms[query, None] * torch.maximum(norms, norms.gather(1, leader[:, None]))
            equal = (scores >= best[:, None] - tolerance) & (scores > -torch.inf) & open_[:, None]
            number = equal.cumsum(1)
            place = filled[:, None] + number - 1
            row, column = (equal & (place < self.k)).nonzero(as_tuple=True)
            at = query[row], place[row, column]
            self.first[at] = items[row, column]
            self.begin[at] = filled[row]
            size = number[:, -1]
            last = open_ & (filled + size >= self.k)
            self.leader[query[last]] = items[last, leader[last]]
            self.size[query[last]] = size[last]
            filled = filled + size
            scores[equal] = -torch.inf

    def neighbours(self) -> Neighbours:
        return Neighbours(*(part.cpu().numpy() for part in (self.first, self.begin, self.leader, self.size)))


def _chunks(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """Ranges of runs that, filled up to the longest of them, have at most DENSE places (or are a single run)."""
    first, longest = 0, 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if index > first and longest * (index + 1 - first) > DENSE:
            yield first, index
            first, longest = index, length
    yield first, len(lengths)
