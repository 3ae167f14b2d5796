"""Sums over all pairs of a batch, in tiles: their memory grows with images + captions, never with the product.

Every loss here is a sum over all (image, caption) pairs as if none matched, and a correction for the few that do
(`positive_cosines`). The first part is the large one, and has a slope that is known in closed form; so its gradients
are computed tile by tile together with its value, and no tile is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 4096

PairFunction = Callable[[Tensor, slice, slice], tuple[Tensor, Tensor]]


def tiles(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of at most TILE x TILE pairs."""
    for top in range(0, rows, TILE):
        for left in range(0, columns, TILE):
            yield slice(top, min(top + TILE, rows)), slice(left, min(left + TILE, columns))


def sum_over_pairs(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, function: PairFunction) -> Tensor:
    """The sum of a function of logit = scale * cosine + bias over all pairs, differentiable once.

    Args:
        image: (images, dim).
        text: (captions, dim).
        scale: a scalar.
        bias: a scalar, or None for 0.
        function: given the logits of a tile, its rows and its columns, the function's sum over the tile, and its
            derivative by each logit.
    """
    bias = torch.zeros_like(scale) if bias is None else bias
    return _SumOverPairs.apply(image, text, scale, bias, function)


class _SumOverPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, function: PairFunction) -> Tensor:
        by_image, by_text = torch.zeros_like(image), torch.zeros_like(text)
        total, by_scale, by_bias = (torch.zeros_like(scale) for _ in range(3))
        for rows, columns in tiles(len(image), len(text)):
            cosine = image[rows] @ text[columns].T
            value, slope = function(cosine * scale + bias, rows, columns)
            total += value
            by_image[rows].addmm_(slope, text[columns])
            by_text[columns].addmm_(slope.T, image[rows])
            by_scale += torch.linalg.vecdot(slope.flatten(), cosine.flatten())
            by_bias += slope.sum()
        ctx.save_for_backward(by_image.mul_(scale), by_text.mul_(scale), by_scale, by_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(part * gradient for part in ctx.saved_tensors), None


def positive_cosines(image: Tensor, text: Tensor, positives: Tensor) -> Tensor:
    """Cosines (P,) of the pairs that match; positives int64 (P, 2) holds their image and caption rows."""
    # index_select: the backward of image[...] adds repeated rows with atomics, in any order.
    return (image.index_select(0, positives[:, 0]) * text.index_select(0, positives[:, 1])).sum(dim=1)


def count_positives(index: Tensor, size: int) -> Tensor:
    """How often each of 0 to size - 1 stands in `index`, int64 (size,). (torch.bincount waits for the GPU.)"""
    return torch.zeros(size, dtype=torch.int64, device=index.device).index_add_(0, index, torch.ones_like(index))
