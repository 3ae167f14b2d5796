"""Exact retrieval ranks of every image and every caption, in both directions, from one pass over tiles of scores.

    i2t, t2i = retrieval_ranks(image_features, text_features, pairs)

The ranks are those of float64 inner products of the features as given. Float64 everywhere would be slow, so a
float32 product filters: its rounding error has a proven bound (`rounding_bound`), a score that differs from the
query's best positive by more than that is counted as it stands, and the few that are closer are decided in float64.
So a rank depends neither on the tile size nor on the device nor on the order of the items.

Two scores of one query are equal when they differ by at most 1e-10 |query| |item|, where the item is the longer of
the two that are compared (the query's longest positive stands for its positives). A float64 product of equal
vectors differs in the last bits with their position; without a tolerance equal items would not tie.

Memory grows with images + captions: beyond the features it is one float32 copy of them and a few tiles.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.scores import (
    Features,
    exact_scores,
    fast_tiles,
    rounding_bound,
    scoring_device,
    tile_size,
)

TIE = 1e-10
CROWDED = 1 / 64  # a tile with a larger share of undecided scores costs less as a float64 matrix product


@dataclass(frozen=True)
class Ranks:
    """What decides the rank of each query: int64 arrays of shape (queries,).

    Only queries with at least one relevant item, in index order. "Equal" is equal to the query's best positive.
    """

    above: np.ndarray
    """Negatives that score above the best positive."""
    tied: np.ndarray
    """Negatives equal to it."""
    positives: np.ndarray
    """Positives equal to it, itself among them: at least 1."""


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
    """Ranks of all queries, (image to text, text to image).

    image_features (images, dim) and text_features (captions, dim) may be of any floating dtype, on any device and
    of any length; pairs (P, 2) holds (image index, caption index) of what is relevant, many-to-many, duplicates
    allowed. device: where to compute (default: where image_features are). tile: images x captions that are scored
    at a time, for speed only. image_name and text_name say how an item is called in an error message.
    processes: those that share the tiles between them; each gives all features, and gets all ranks.

    Raises UserError for shapes that do not fit, pairs out of range, and features that are not finite.
    """
    device = scoring_device(image_features, device)
    images = Features(image_features, device, "image", image_name)
    texts = Features(text_features, device, "caption", text_name)
    if images.dim != texts.dim:
        raise UserError(
            f"image features have {images.dim} dimensions and text features {texts.dim}: they must be equal"
        )
    image, text = _unique_pairs(pairs, images, texts)
    scores = exact_scores(images, image, texts, text)
    i2t = _Direction(images, texts, image, text, scores)
    t2i = _Direction(texts, images, text, image, scores)
    deal = slice(processes.rank, None, processes.world_size)
    for part in fast_tiles(images, texts, image, text, tile or tile_size(device), deal):
        crowded_i2t = i2t.count(part.rows, part.columns, part.scores, part.space)
        crowded_t2i = t2i.count(part.columns, part.rows, part.scores.T, part.space.T)
        if crowded_i2t or crowded_t2i:
            exact = images.exact(part.rows) @ texts.exact(part.columns).T
            exact[part.positives] = -torch.inf
            if crowded_i2t:
                i2t.count_exactly(part.rows, part.columns, exact)
            if crowded_t2i:
                t2i.count_exactly(part.columns, part.rows, exact.T)
    return i2t.ranks(processes), t2i.ranks(processes)


class _Direction:
    """One direction: for each query the score to beat, and how many negatives were found to beat or to equal it.

    best (queries,) is the score of the best positive, and low to high the float32 scores too close to it to call.
    """

    def __init__(self, queries: Features, items: Features, query: Tensor, item: Tensor, scores: Tensor):
        """query, item (P,) are the relevant pairs and scores (P,) their float64 scores."""
        self.queries, self.items = queries, items
        zeros = torch.zeros_like(queries.norms)
        self.best = (zeros - torch.inf).scatter_reduce(0, query, scores, "amax")
        self.reach = zeros.scatter_reduce(0, query, items.norms[item], "amax")
        self.above, self.tied, self.positives = zeros.long(), zeros.long(), zeros.long()
        equal = scores >= self.best[query] - TIE * queries.norms[query] * self.reach[query]
        self.positives.index_add_(0, query, equal.long())
        # Twice the tie tolerance: once for the tie rule, once for the last bits of the float64 scores themselves.
        relative, absolute = rounding_bound(queries.dim)
        margin = queries.norms * items.norms.max() * (relative + 2 * TIE) + absolute
        # Rounded outwards. (A query without positives counts everything, and is left out in the end.)
        infinity = torch.tensor(torch.inf, device=zeros.device)
        self.low = torch.nextafter((self.best - margin).float(), -infinity)
        self.high = torch.nextafter((self.best + margin).float(), infinity)

    def count(self, queries: slice, items: slice, fast: Tensor, mask: Tensor) -> bool:
        """Counts the negatives of a tile by its float32 scores, fast (queries, items), -inf at positives.

        Counts nothing and returns True if too many are undecided: then count_exactly is the cheaper way. mask is
        working space of fast's shape.
        """
        low, high = self.low[queries, None], self.high[queries, None]
        # Ones and zeros in float32: CPUs compare into float32, and sum it, several times faster than bool. (Exact up
        # to 2**24 ones, and no tile is that wide.)
        possible = torch.ge(fast, low, out=mask).sum(1)
        above = torch.gt(fast, high, out=mask).sum(1)
        undecided = possible - above
        if undecided.sum() > CROWDED * fast.numel():
            return True
        self.above[queries] += above.long()
        rows = undecided.nonzero()[:, 0]
        if len(rows):
            close = fast[rows]
            row, column = ((close >= low[rows]) & (close <= high[rows])).nonzero(as_tuple=True)
            self._decide(rows[row] + queries.start, column + items.start)
        return False

    def count_exactly(self, queries: slice, items: slice, exact: Tensor) -> None:
        """Counts the negatives of a tile by its float64 scores, exact (queries, items), -inf at positives."""
        gap = exact - self.best[queries, None]
        longer = torch.maximum(self.items.norms[None, items], self.reach[queries, None])
        equal = TIE * self.queries.norms[queries, None] * longer
        self.above[queries] += (gap > equal).sum(1)
        self.tied[queries] += (gap.abs() <= equal).sum(1)

    def _decide(self, query: Tensor, item: Tensor) -> None:
        """Counts these (query, item) negatives by their float64 scores."""
        gap = exact_scores(self.queries, query, self.items, item) - self.best[query]
        equal = TIE * self.queries.norms[query] * torch.maximum(self.items.norms[item], self.reach[query])
        self.above.index_add_(0, query, (gap > equal).long())
        self.tied.index_add_(0, query, (gap.abs() <= equal).long())

    def ranks(self, processes: Processes) -> Ranks:
        for counted in (self.above, self.tied):
            processes.sum(counted)
        asked = self.positives > 0
        return Ranks(*(counts[asked].cpu().numpy() for counts in (self.above, self.tied, self.positives)))


def _unique_pairs(pairs: Tensor | np.ndarray, images: Features, texts: Features) -> tuple[Tensor, Tensor]:
    """The distinct relevant (image, caption) indices, as two int64 tensors (P,)."""
    if not isinstance(pairs, Tensor):
        pairs = np.array(pairs)
        pairs = torch.from_numpy(pairs.astype(np.int64) if pairs.dtype.kind == "u" else pairs)
    pairs = pairs.to(images.norms.device)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or len(pairs) == 0 or pairs.is_floating_point():
        raise UserError(
            f"pairs have shape {tuple(pairs.shape)} and type {pairs.dtype}: expected integers (P, 2), at least one"
        )
    for column, side in zip(pairs.long().T, (images, texts)):
        wrong = (column < 0) | (column >= len(side))
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise UserError(
                f"pair {row} names {side.kind} {int(column[row])}, but there are {len(side)} (0 to {len(side) - 1})"
            )
    keys = torch.unique(pairs[:, 0].long() * len(texts) + pairs[:, 1].long())
    return keys // len(texts), keys % len(texts)
