"""The exact top k items of every query, in either direction, from one pass over tiles of scores.

    neighbours = nearest(images, texts, 10)
    neighbours["t2i"].items  # image indices (captions, 10), best first

The order is that of float64 inner products of the features as given. As in `ranks`, scores are equal if they differ by
at most 1e-10 |query| |item| (for the longer item). The best remaining item is the leader of a group: all items equal to
it follow, in index order; then the next group begins. So the order depends on neither tiles, device nor rounding.

A float32 product filters. Its error is within a proven bound m (`rounding_bound`): if k items have a float32 score of
at least s, their exact scores are at least s - m, and an item with a float32 score below s - 2 m (minus the tie
tolerance) is neither among the top k nor equal to one of them. The remaining candidates, few more than k per query, are
sorted; float64 decides between neighbouring scores that are closer than the bound.

Memory grows with queries times k, plus a few tiles. A query with too many candidates (features that are nearly equal)
is scored against all items in float64, a few queries at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.scores import (
    TIE,
    Features,
    check_dimensions,
    exact_scores,
    fast_tiles,
    score_margin,
    tile_size,
)

DIRECTIONS = ("i2t", "t2i")
COLLECTED = 2**20  # candidates of one direction that trigger pruning
CROWD = 64  # a query with more candidates than this and twice k is crowded
DENSE = 2**20  # float64 scores to sort at a time


@dataclass(frozen=True)
class Neighbours:
    """The top k items of each query, int64 (queries, k), best first.

    k is at most the number of items. The last group of equal items may extend beyond the k: leader and size describe
    it.
    """

    items: np.ndarray
    """Item indices."""
    begin: np.ndarray
    """First place, from 0, of each item's group of equal items."""
    leader: np.ndarray
    """(queries,) The leader of the last group: the other items of the group are equal to it."""
    size: np.ndarray
    """(queries,) Number of items in the last group, including those beyond the k."""


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
    """Find the top k captions of each image ("i2t") and the top k images of each caption ("t2i").

    tile: images x captions to score at a time; affects speed only. processes: share the tiles; each passes all features
    and gets all neighbours.

    Raises UserError if k is below 1 or the features have different dimensions.
    """
    if k < 1:
        raise UserError(f"the top {k} items: k must be at least 1")
    check_dimensions(images, texts)
    sides = {"i2t": (images, texts), "t2i": (texts, images)}
    searches = {name: _Direction(*sides[name], k) for name in directions}
    none = torch.empty(0, dtype=torch.int64, device=images.norms.device)
    deal = slice(processes.rank, None, processes.world_size)
    for block in fast_tiles(images, texts, none, none, tile or tile_size(none.device), deal):
        if "i2t" in searches:
            searches["i2t"].collect(block.rows, block.columns, block.scores)
        if "t2i" in searches:
            searches["t2i"].collect(block.columns, block.rows, block.scores.T)
    return {name: search.neighbours(processes) for name, search in searches.items()}


class _Direction:
    """The search in one direction: for each query, the candidates for its top k.

    best (queries, k): the k highest float32 scores of groups of items so far. low (queries,): the lowest float32 score
    of a candidate; infinity for a `crowded` query, which is scored against all items instead.
    """

    def __init__(self, queries: Features, items: Features, k: int):
        self.queries, self.items, self.k = queries, items, min(k, len(items))
        self.slack = 2 * score_margin(queries, items)
        self.best = torch.full((len(queries), self.k), -torch.inf, device=self.slack.device)
        self.low = self.best[:, 0].clone()
        self.crowded = torch.zeros_like(self.low, dtype=torch.int64)
        self.candidates = [(self.crowded[:0], self.crowded[:0], self.low[:0])]  # (query, item, float32 score)
        self.collected = 0

    def collect(self, queries: slice, items: slice, fast: Tensor) -> None:
        """Collect the candidates of a tile by its float32 scores, fast (queries, items).

        The items are split into strided groups. The maxima of the groups give a lower bound of the k-th best score so
        far, and show which groups hold candidates.
        """
        # find the queries with a score of interest
        groups = min(fast.shape[1], max(64, 4 * self.k))
        maxima = _group_maxima(fast, groups)
        promising = (maxima.amax(1) >= self.low[queries]).nonzero()[:, 0]
        if len(promising) == 0:
            return
        # raise their lower bounds
        maxima, rows = maxima[promising], promising + queries.start
        best = torch.cat([self.best[rows], maxima], 1).topk(self.k).values
        self.best[rows] = best
        low = _round_down(best[:, -1] - self.slack[rows])
        self.low[rows] = low
        # collect the candidates of the groups that hold any
        row, group = (maxima >= low[:, None]).nonzero(as_tuple=True)
        column = group[:, None] + torch.arange(0, fast.shape[1], groups, device=group.device)
        is_item = column < fast.shape[1]
        scores = fast[promising[row][:, None], column.clamp(max=fast.shape[1] - 1)]
        hit, step = (is_item & (scores >= low[row][:, None])).nonzero(as_tuple=True)
        self.candidates.append((rows[row[hit]], column[hit, step] + items.start, scores[hit, step]))
        self.collected += len(hit)
        if self.collected > max(COLLECTED, 4 * self.best.numel()):
            self._prune()

    def _prune(self) -> None:
        """Drop the candidates below the current bounds; mark queries with too many as crowded."""
        query, item, score = (torch.cat(parts) for parts in zip(*self.candidates))
        keep = score >= self.low[query]
        crowded = torch.bincount(query[keep], minlength=len(self.low)) > 2 * self.k + CROWD
        self.low[crowded] = torch.inf
        self.crowded[crowded] = 1
        keep &= ~crowded[query]
        self.candidates = [(query[keep], item[keep], score[keep])]
        self.collected = len(self.candidates[0][0])

    def neighbours(self, processes: Processes) -> Neighbours:
        """Sort the candidates of all processes. Every process gets the whole."""
        self._prune()
        crowded = processes.max(self.crowded) > 0
        candidates = [processes.all_gather_rows(part) for part in self.candidates[0]]
        exact = _ExactNeighbours(self.queries, self.items, self.k)
        query, item, score = (part[~crowded[candidates[0]]] for part in candidates)
        exact.sort_candidates(query, item, score, self.slack)
        exact.sort_all_items(crowded.nonzero()[:, 0])
        return exact.neighbours()


def _round_down(scores: Tensor) -> Tensor:
    """float64 scores in float32, rounded down."""
    return torch.nextafter(scores.float(), torch.tensor(-torch.inf, device=scores.device))


def _group_maxima(fast: Tensor, groups: int) -> Tensor:
    """The best score of each group, (queries, groups). Item i is in group i % groups."""
    maxima = fast[:, :groups].clone()
    for start in range(groups, fast.shape[1], groups):
        part = fast[:, start : start + groups]
        best = maxima[:, : part.shape[1]]
        torch.maximum(best, part, out=best)
    return maxima


class _ExactNeighbours:
    """Sorts the candidates of each query exactly, and keeps its top k."""

    def __init__(self, queries: Features, items: Features, k: int):
        self.queries, self.items, self.k = queries, items, k
        self.top = torch.full((len(queries), k), -1, device=queries.norms.device)
        self.begin = torch.arange(k, device=self.top.device).repeat(len(queries), 1)
        self.leader = self.top[:, 0].clone()
        self.size = torch.ones_like(self.leader)

    def sort_candidates(self, query: Tensor, item: Tensor, score: Tensor, slack: Tensor) -> None:
        """Sort all candidates (n,) of some queries by float32 score, and by float64 score within a run.

        A run is a sequence of scores of one query whose gaps are within the query's slack.
        """
        # sort by query, then by score
        order = score.argsort(descending=True)
        order = order[query[order].argsort(stable=True)]
        query, item, score = query[order], item[order], score[order]
        # find the runs
        index = torch.arange(len(query), device=query.device)
        starts = torch.ones_like(index, dtype=torch.bool)
        starts[1:] = (query[1:] != query[:-1]) | (score[:-1].double() - score[1:] > slack[query[1:]])
        count = torch.bincount(query, minlength=len(self.queries))
        place = index - (count.cumsum(0) - count)[query]
        run = starts.cumsum(0) - 1
        begin, length = place[starts][run], torch.bincount(run)[run]
        # runs of one item need no float64 score
        in_top = begin < self.k
        single = in_top & (length == 1)
        self.top[query[single], place[single]] = item[single]
        last = single & (place == self.k - 1)
        self.leader[query[last]] = item[last]
        close = in_top & (length > 1)
        query, item, run, begin = query[close], item[close], run[close], begin[close]
        exact = exact_scores(self.queries, query, self.items, item) if len(query) else score[:0].double()
        self._sort_runs(run, query, item, exact, begin)

    def sort_all_items(self, queries: Tensor) -> None:
        """Sort by the float64 scores of these queries (n,) with all items."""
        if len(queries) == 0:
            return
        longest = self.items.norms.max()
        for rows in queries.split(max(1, 4 * DENSE // len(self.items))):
            exact = torch.empty(len(rows), len(self.items), dtype=torch.float64, device=rows.device)
            left, step = self.queries.exact(rows), self.items.chunk()
            for start in range(0, len(self.items), step):
                columns = slice(start, start + step)
                torch.mm(left, self.items.exact(columns).T, out=exact[:, columns])
            batch = max(1, DENSE // len(self.items))  # all items of these queries may be equal
            for some, scores in zip(rows.split(batch), exact.split(batch)):
                equal = 2 * TIE * self.queries.norms[some] * longest
                low = scores.topk(self.k).values[:, -1] - equal
                run, item = (scores >= low[:, None]).nonzero(as_tuple=True)
                self._sort_runs(run, some[run], item, scores[run, item], torch.zeros_like(run))

    def _sort_runs(self, run: Tensor, query: Tensor, item: Tensor, exact: Tensor, begin: Tensor) -> None:
        """Sort runs of candidates. All tensors are (n,), grouped by run: float64 scores, and first place of the run."""
        if len(run) == 0:
            return
        run = torch.unique_consecutive(run, return_inverse=True)[1]
        order = (run * len(self.items) + item).argsort()  # by index within a run
        query, item, exact, begin = (part[order] for part in (query, item, exact, begin))
        length = torch.bincount(run)
        starts = length.cumsum(0) - length
        position = torch.arange(len(run), device=run.device) - starts[run]
        # pad the runs of a chunk to matrices
        for first, end in _chunks(length.tolist()):
            part = slice(int(starts[first]), int(starts[end - 1] + length[end - 1]))
            shape = end - first, int(length[first:end].max())
            cell = run[part] - first, position[part]
            scores = torch.full(shape, -torch.inf, dtype=torch.float64, device=run.device)
            items = torch.zeros(shape, dtype=torch.int64, device=run.device)
            scores[cell], items[cell] = exact[part], item[part]
            heads = starts[first:end]
            self._place(query[heads], begin[heads], items, scores)

    def _place(self, query: Tensor, place: Tensor, items: Tensor, scores: Tensor) -> None:
        """Fill the places of queries (n,) from `place` (n,) on with items (n, m), which are in index order.

        scores (n, m) is float64, with -inf for padding; it is overwritten.
        """
        norms = self.items.norms[items]
        while True:
            best, leader = scores.max(1)
            active = (place < self.k) & (best > -torch.inf)
            if not active.any():
                return
            # the group of items equal to the best one
            tolerance = TIE * self.queries.norms[query, None] * torch.maximum(norms, norms.gather(1, leader[:, None]))
            equal = (scores >= best[:, None] - tolerance) & (scores > -torch.inf) & active[:, None]
            count = equal.cumsum(1)
            places = place[:, None] + count - 1
            # its first items fill the places up to k
            row, column = (equal & (places < self.k)).nonzero(as_tuple=True)
            at = query[row], places[row, column]
            self.top[at] = items[row, column]
            self.begin[at] = place[row]
            size = count[:, -1]
            last = active & (place + size >= self.k)
            self.leader[query[last]] = items[last, leader[last]]
            self.size[query[last]] = size[last]
            place = place + size
            scores[equal] = -torch.inf

    def neighbours(self) -> Neighbours:
        return Neighbours(*(part.cpu().numpy() for part in (self.top, self.begin, self.leader, self.size)))


def _chunks(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """Ranges of runs that have at most DENSE cells if padded to the longest (or are a single run)."""
    first, longest = 0, 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if index > first and longest * (index + 1 - first) > DENSE:
            yield first, index
            first, longest = index, length
    yield first, len(lengths)
