"""Exact retrieval ranks of every image and every caption, in both directions, from one pass over tiles of scores.

    i2t, t2i = retrieval_ranks(image_features, text_features, pairs)

The ranks are those of float64 inner products of the features as given. Because float64 is slow, a float32 product
filters. Its rounding error has a proven bound (`rounding_bound`): a score that differs from the query's best positive
by more than the bound is counted directly, and the few closer scores are decided in float64. So ranks depend on neither
the tile size, the device nor the order of the items.

Two scores of a query are equal if they differ by at most 1e-10 |query| |item|, for the longer of the two items (the
query's longest positive represents its positives). The tolerance is needed because a float64 product of equal vectors
differs in the last bits with their position.

Memory grows with images + captions: the features, one float32 copy of them, and a few tiles.
"""

from collections.abc import Callable
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
    scoring_device,
    tile_size,
)

CROWDED = 1 / 64  # above this share of undecided scores, a float64 matrix product of the tile is faster


@dataclass(frozen=True)
class Ranks:
    """The counts that determine the rank of each query, int64 (queries,).

    Only queries with at least one relevant item, in index order. "Equal" means equal to the query's best positive.
    """

    above: np.ndarray
    """Negatives that score above the best positive."""
    tied: np.ndarray
    """Negatives equal to it."""
    positives: np.ndarray
    """Positives equal to it, including itself: at least 1."""
    queries: np.ndarray
    """The indices of the queries, ascending."""

    def __getitem__(self, rows: np.ndarray) -> "Ranks":
        """The ranks of some rows."""
        return Ranks(self.above[rows], self.tied[rows], self.positives[rows], self.queries[rows])


@torch.no_grad()
def retrieval_ranks(
    image_features: Tensor | np.ndarray,
    text_features: Tensor | np.ndarray,
    pairs: Tensor | np.ndarray,
    *,
    device: torch.device | str | None = None,
    tile: tuple[int, int] | None = None,
    image_name: Callable[[int], str] = str,
    text_name: Callable[[int], str] = str,
    processes: Processes = SINGLE_PROCESS,
) -> tuple[Ranks, Ranks]:
    """Compute the ranks of all queries, (image to text, text to image).

    Args:
        image_features: (images, dim), any floating dtype, device and vector length.
        text_features: (captions, dim), likewise.
        pairs: relevant (image index, caption index), (P, 2); many-to-many, duplicates allowed.
        device: where to compute (default: the device of image_features).
        tile: images x captions to score at a time; affects speed only.
        image_name, text_name: name of an item in error messages.
        processes: share the tiles; each passes all features and gets all ranks.

    Raises UserError for shapes that do not match, pairs out of range, and features that are not finite.
    """
    device = scoring_device(image_features, device)
    images = Features(image_features, device, "image", image_name)
    texts = Features(text_features, device, "caption", text_name)
    check_dimensions(images, texts)
    image, text = _unique_pairs(pairs, images, texts)
    scores = exact_scores(images, image, texts, text)
    i2t = _Direction(images, texts, image, text, scores)
    t2i = _Direction(texts, images, text, image, scores)
    # count the negatives of each tile, in float64 if too many are undecided
    deal = slice(processes.rank, None, processes.world_size)
    for block in fast_tiles(images, texts, image, text, tile or tile_size(device), deal):
        i2t_done = i2t.count(block.rows, block.columns, block.scores, block.space)
        t2i_done = t2i.count(block.columns, block.rows, block.scores.T, block.space.T)
        if not (i2t_done and t2i_done):
            exact = images.exact(block.rows) @ texts.exact(block.columns).T
            exact[block.positives] = -torch.inf
            if not i2t_done:
                i2t.count_exact(block.rows, block.columns, exact)
            if not t2i_done:
                t2i.count_exact(block.columns, block.rows, exact.T)
    return i2t.ranks(processes), t2i.ranks(processes)


class _Direction:
    """Counts of one direction: for each query, the negatives above its best positive and those equal to it.

    best (queries,) is the score of the best positive; float32 scores from low to high are too close to it to decide.
    """

    def __init__(self, queries: Features, items: Features, query: Tensor, item: Tensor, scores: Tensor):
        """query, item (P,) are the relevant pairs, scores (P,) their float64 scores."""
        self.queries, self.items = queries, items
        zeros = torch.zeros_like(queries.norms)
        self.best = (zeros - torch.inf).scatter_reduce(0, query, scores, "amax")
        self.reach = zeros.scatter_reduce(0, query, items.norms[item], "amax")
        self.above, self.tied, self.positives = zeros.long(), zeros.long(), zeros.long()
        equal = scores >= self.best[query] - TIE * queries.norms[query] * self.reach[query]
        self.positives.index_add_(0, query, equal.long())
        margin = score_margin(queries, items)
        # Round outwards. (A query without positives counts everything; `ranks` drops it.)
        infinity = torch.tensor(torch.inf, device=zeros.device)
        self.low = torch.nextafter((self.best - margin).float(), -infinity)
        self.high = torch.nextafter((self.best + margin).float(), infinity)

    def count(self, queries: slice, items: slice, fast: Tensor, mask: Tensor) -> bool:
        """Count the negatives of a tile by its float32 scores, fast (queries, items), -inf at positives.

        Returns whether it did: if too many scores are undecided, nothing is counted and count_exact is cheaper.
        mask is scratch memory of fast's shape.
        """
        low, high = self.low[queries, None], self.high[queries, None]
        # float32 ones and zeros: CPUs compare into float32, and sum it, several times faster than bool. (Exact up to
        # 2**24 ones; no tile is that wide.)
        possible = torch.ge(fast, low, out=mask).sum(1)
        above = torch.gt(fast, high, out=mask).sum(1)
        undecided = possible - above
        if undecided.sum() > CROWDED * fast.numel():
            return False
        self.above[queries] += above.long()
        rows = undecided.nonzero()[:, 0]
        if len(rows):
            close = fast[rows]
            row, column = ((close >= low[rows]) & (close <= high[rows])).nonzero(as_tuple=True)
            self._count_pairs(rows[row] + queries.start, column + items.start)
        return True

    def count_exact(self, queries: slice, items: slice, exact: Tensor) -> None:
        """Count the negatives of a tile by its float64 scores, exact (queries, items), -inf at positives."""
        gap = exact - self.best[queries, None]
        longer = torch.maximum(self.items.norms[None, items], self.reach[queries, None])
        equal = TIE * self.queries.norms[queries, None] * longer
        self.above[queries] += (gap > equal).sum(1)
        self.tied[queries] += (gap.abs() <= equal).sum(1)

    def _count_pairs(self, query: Tensor, item: Tensor) -> None:
        """Count (query, item) negatives by their float64 scores."""
        gap = exact_scores(self.queries, query, self.items, item) - self.best[query]
        equal = TIE * self.queries.norms[query] * torch.maximum(self.items.norms[item], self.reach[query])
        self.above.index_add_(0, query, (gap > equal).long())
        self.tied.index_add_(0, query, (gap.abs() <= equal).long())

    def ranks(self, processes: Processes) -> Ranks:
        for counts in (self.above, self.tied):
            processes.sum(counts)
        has_positives = self.positives > 0
        counted = (self.above, self.tied, self.positives, torch.arange(len(has_positives), device=has_positives.device))
        return Ranks(*(counts[has_positives].cpu().numpy() for counts in counted))


def _unique_pairs(pairs: Tensor | np.ndarray, images: Features, texts: Features) -> tuple[Tensor, Tensor]:
    """The distinct relevant (image, caption) indices, two int64 (P,). Raises UserError for invalid pairs."""
    if not isinstance(pairs, Tensor):
        pairs = np.array(pairs)
        pairs = torch.from_numpy(pairs.astype(np.int64) if pairs.dtype.kind == "u" else pairs)
    pairs = pairs.to(images.norms.device)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or len(pairs) == 0 or pairs.is_floating_point():
        raise UserError(
            f"pairs have shape {tuple(pairs.shape)} and dtype {pairs.dtype}: expected integers (P, 2), at least one"
        )
    for column, features in zip(pairs.long().T, (images, texts)):
        count = len(features)
        invalid = (column < 0) | (column >= count)
        if invalid.any():
            row = int(invalid.nonzero()[0])
            raise UserError(
                f"pair {row} names {features.kind} {int(column[row])}, but there are {count} (0 to {count - 1})"
            )
    keys = torch.unique(pairs[:, 0].long() * len(texts) + pairs[:, 1].long())
    return keys // len(texts), keys % len(texts)
