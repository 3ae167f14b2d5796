"""Sums over all (image, caption) pairs of a batch, in tiles: memory grows with images + captions, not their product.

Every loss here is a sum over all pairs, and a correction for the few positive ones (`positive_cosines`). The sum is
computed tile by tile under `torch.utils.checkpoint`: the backward pass computes a tile's logits again instead of
keeping them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TILE = 4096


def map_tiles(function: Callable[..., Any], image: Tensor, text: Tensor, *scalars: Tensor) -> list[list[Any]]:
    """Return function(image rows, caption rows, *scalars) for each tile of at most TILE x TILE pairs, differentiable.

    The outer list is over rows of tiles, the inner one over their columns. The function must be deterministic.
    """

    def compute(*arguments: Tensor) -> Any:
        # (The state of the random generator would be read from the GPU, which stalls it.)
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)

    texts = text.split(TILE)
    return [[compute(rows, columns, *scalars) for columns in texts] for rows in image.split(TILE)]


def sum_over_pairs(function: Callable[[Tensor], Tensor], image: Tensor, text: Tensor, *scalars: Tensor) -> Tensor:
    """Return the sum of function(cosines, *scalars) over all pairs, a scalar. See `map_tiles`."""

    def sum_tile(rows: Tensor, columns: Tensor, *scalars: Tensor) -> Tensor:
        return function(rows @ columns.T, *scalars).sum()

    return torch.stack([value for row in map_tiles(sum_tile, image, text, *scalars) for value in row]).sum()


def positive_cosines(image: Tensor, text: Tensor, positives: Tensor) -> Tensor:
    """Return the cosines (P,) of the positive pairs; positives int64 (P, 2) holds their image and caption rows."""
    # index_select: the backward of image[...] adds repeated rows with atomics, in any order.
    return (image.index_select(0, positives[:, 0]) * text.index_select(0, positives[:, 1])).sum(dim=1)


def count_positives(index: Tensor, size: int) -> Tensor:
    """Count how often each of 0 to size - 1 is in `index`, int64 (size,). (torch.bincount waits for the GPU.)"""
    return torch.zeros(size, dtype=torch.int64, device=index.device).index_add_(0, index, torch.ones_like(index))
