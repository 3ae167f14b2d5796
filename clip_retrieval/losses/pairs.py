"""Sums over all (image, caption) pairs of a batch, in tiles: memory grows with images + captions, not their product.

Every loss is a sum over all pairs, plus a correction for the positives (`positive_cosines`). The sum is computed tile
by tile under `torch.utils.checkpoint`: the backward pass recomputes the logits of a tile instead of storing them. A
batch of one tile needs the same memory without, and fewer kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clip_retrieval.distributed import Processes

TILE = 4096


def map_tiles(function: Callable[..., Any], image: Tensor, text: Tensor, *scalars: Tensor) -> list[list[Any]]:
    """Return function(image rows, caption rows, *scalars) for each tile of at most TILE x TILE pairs, differentiable.

    The outer list is over rows of tiles, the inner list over columns. The function must be deterministic.
    """

    if len(image) <= TILE and len(text) <= TILE:
        return [[function(image, text, *scalars)]]

    def compute(*arguments: Tensor) -> Any:
        # Saving the state of the random generator would stall the GPU.
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)

    texts = text.split(TILE)
    return [[compute(rows, columns, *scalars) for columns in texts] for rows in image.split(TILE)]


def sum_over_pairs(function: Callable[..., Tensor], image: Tensor, text: Tensor, *scalars: Tensor) -> Tensor:
    """Return the sum of function(cosines, *scalars) over all pairs, a scalar. See `map_tiles`."""

    def sum_tile(rows: Tensor, columns: Tensor, *scalars: Tensor) -> Tensor:
        return function(rows @ columns.T, *scalars).sum()

    return torch.stack([value for row in map_tiles(sum_tile, image, text, *scalars) for value in row]).sum()


def positive_cosines(image: Tensor, text: Tensor, positives: Tensor) -> Tensor:
    """Return the cosines (P,) of the positive pairs; positives: int64 (P, 2), image and caption rows."""
    # index_select, because the backward of image[...] adds duplicate rows in random order (atomics).
    return (image.index_select(0, positives[:, 0]) * text.index_select(0, positives[:, 1])).sum(dim=1)


def count_positives(index: Tensor, size: int) -> Tensor:
    """Count each of 0 to size - 1 in `index`, int64 (size,). torch.bincount would synchronize with the GPU."""
    return torch.zeros(size, dtype=torch.int64, device=index.device).index_add_(0, index, torch.ones_like(index))


def count_directions(
    positives: Tensor, images: int, captions: int, processes: Processes
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count the positives of each image (images,) and of each caption (captions,), and the rows of each direction.

    The last two are scalars, at least 1: the images and the captions of all processes that have a positive.
    """
    of_image = count_positives(positives[:, 0], images)
    of_caption = processes.sum(count_positives(positives[:, 1], captions))
    rows = processes.sum((of_image > 0).sum()).clamp(min=1)
    return of_image, of_caption, rows, (of_caption > 0).sum().clamp(min=1)
