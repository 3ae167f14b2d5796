"""The hinge loss on the hardest negatives of VSE++ (Faghri et al. 2018, arXiv:1707.05612), with several positives.

With cosines s_ij, P(i) the positives of image i, and h_i the highest cosine of its negatives:

    image to text:  mean over i of  mean over j in P(i) of max(0, margin + h_i - s_ij)
    text to image:  the same over the columns
    loss:           the mean of the two directions, or weighted
"""

from __future__ import annotations

import torch
from torch import Tensor

from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.losses import pairs
from clip_retrieval.losses.pairs import count_directions, positive_cosines


def triplet(
    image_features: Tensor,
    text_features: Tensor,
    positives: Tensor,
    margin: float = 0.2,
    i2t_weight: float = 0.5,
    processes: Processes = SINGLE_PROCESS,
) -> Tensor:
    """Compute the mean hinge loss of the positives against the hardest negative of their row and of their column.

    Rows without a positive, and rows without a negative, have no loss.

    Args:
        image_features: (images, dim), L2-normalised; of this process.
        text_features: (captions, dim), L2-normalised; of all processes.
        positives: int64 (P, 2), matching rows of image_features and text_features, each pair once.
        margin: a positive whose cosine exceeds the hardest negative's by this much has no loss.
        i2t_weight: weight of the image-to-text direction; the other one has the rest.
        processes: the process group that shares the batch.

    Returns:
        The loss, a scalar; with several processes, the part of this process: the parts sum to the loss.
    """
    # weights of the positives: each direction is a mean over the rows with a positive
    row, column = positives.T
    counts = count_directions(positives, len(image_features), len(text_features), processes)
    positives_of_row, positives_of_column, rows, columns = counts

    # the hardest negatives; those of a column may be another process's images
    caption, image = find_hardest_negatives(image_features, text_features, positives)
    of_row = _cosines_with(image_features, text_features, caption)
    of_column = processes.all_gather(_cosines_with(text_features, image_features, image)[None]).max(0).values

    cosines = positive_cosines(image_features, text_features, positives)
    i2t = (margin + of_row.index_select(0, row) - cosines).clamp(min=0) / (positives_of_row[row] * rows)
    t2i = (margin + of_column.index_select(0, column) - cosines).clamp(min=0) / (positives_of_column[column] * columns)
    return i2t_weight * i2t.sum() + (1 - i2t_weight) * t2i.sum()


@torch.no_grad()
def find_hardest_negatives(image: Tensor, text: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """Find the negative caption of each image and the negative image of each caption with the highest cosine.

    Returns:
        int64 (images,) and (captions,), -1 if all are positives. Memory is that of a tile.
    """
    best = [image.new_full((len(side),), -torch.inf) for side in (image, text)]
    found = [torch.full((len(side),), -1, device=side.device) for side in (image, text)]
    for first_row in range(0, len(image), pairs.TILE):
        rows = slice(first_row, first_row + pairs.TILE)
        for first_column in range(0, len(text), pairs.TILE):
            columns = slice(first_column, first_column + pairs.TILE)
            cosines = image[rows] @ text[columns].T
            _exclude(cosines, positives[:, 0] - first_row, positives[:, 1] - first_column)
            for side, own, dim, first in ((0, rows, 1, first_column), (1, columns, 0, first_row)):
                highest, index = cosines.max(dim)
                is_better = highest > best[side][own]
                found[side][own] = torch.where(is_better, index + first, found[side][own])
                best[side][own] = torch.maximum(highest, best[side][own])
    return found[0], found[1]


def _exclude(cosines: Tensor, row: Tensor, column: Tensor) -> None:
    """Set the cosines of these pairs, as far as they are in the tile, to -inf; a selection would wait for the GPU."""
    height, width = cosines.shape
    is_inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    cosines.view(-1).index_add_(0, place, torch.where(is_inside, -torch.inf, 0.0).to(cosines.dtype))


def _cosines_with(features: Tensor, others: Tensor, index: Tensor) -> Tensor:
    """Compute the cosine (n,) of each row of features (n, dim) with others[index], or -inf if the index is -1."""
    cosines = (features * others.index_select(0, index.clamp(min=0))).sum(1)
    return torch.where(index >= 0, cosines, -torch.inf)
