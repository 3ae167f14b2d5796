"""InfoNCE, CLIP's loss (Radford et al. 2021, arXiv:2103.00020), with several positives per row."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.losses.pairs import count_positives, positive_cosines, sum_over_pairs, tiles


def infonce(
    image_features: Tensor,
    text_features: Tensor,
    positives: Tensor,
    logit_scale: Tensor,
    processes: Processes = SINGLE_PROCESS,
) -> Tensor:
    """The mean of the image-to-text and the text-to-image cross-entropy.

    The target of a row is spread evenly over its positives, so two captions of one image do not compete. A row
    without a positive does not count.

    Args:
        image_features: (images, dim), L2-normalised; with several processes, this one's.
        text_features: (captions, dim), L2-normalised; with several processes, those of all.
        positives: int64 (P, 2), rows of image_features and text_features that belong together.
        logit_scale: the factor on the cosines (not its logarithm), a scalar.
        processes: those that share the batch.

    Returns:
        The loss, a scalar; with several processes, this one's part of it: the loss is their sum.
    """
    row, column = positives.T
    positives_of_row = count_positives(row, len(image_features))
    positives_of_column = processes.sum(count_positives(column, len(text_features)))
    # Each direction is a mean over the rows, or columns, that have a positive, and counts for one half.
    rows = processes.sum((positives_of_row > 0).sum()).clamp(min=1)
    columns = (positives_of_column > 0).sum().clamp(min=1)
    row_weight = (positives_of_row > 0).to(image_features.dtype) / (2 * rows)
    column_weight = (positives_of_column > 0).to(image_features.dtype) / (2 * columns)

    with torch.no_grad():
        of_rows, of_columns = _log_sums(image_features, text_features, logit_scale, processes)
        # Every process knows all columns' sums, and counts its part of them.
        value = row_weight @ of_rows + column_weight @ of_columns / processes.world_size

    def slope(logits: Tensor, i: slice, j: slice) -> tuple[Tensor, Tensor]:
        of_tile = (logits - of_rows[i, None]).exp_() * row_weight[i, None]
        of_tile += (logits - of_columns[j]).exp_() * column_weight[j]
        return torch.zeros_like(value), of_tile

    # `value` is a constant to autograd, and the sum over pairs is 0: together, the value and its gradient.
    log_sums = value + sum_over_pairs(image_features, text_features, logit_scale, None, slope)
    weight = row_weight[row] / positives_of_row[row] + column_weight[column] / positives_of_column[column]
    return log_sums - logit_scale * (weight @ positive_cosines(image_features, text_features, positives))


def _log_sums(image: Tensor, text: Tensor, scale: Tensor, processes: Processes) -> tuple[Tensor, Tensor]:
    """The logarithms of the sums of exp(logit), over each row (images,), and over each column of all processes."""
    of_rows = image.new_full((len(image),), -torch.inf)
    of_columns = image.new_full((len(text),), -torch.inf)
    for rows, columns in tiles(len(image), len(text)):
        logits = scale * (image[rows] @ text[columns].T)
        of_rows[rows] = torch.logaddexp(of_rows[rows], logits.logsumexp(1))
        of_columns[columns] = torch.logaddexp(of_columns[columns], logits.logsumexp(0))
    highest = processes.max(of_columns.clone())
    return of_rows, highest + processes.sum((of_columns - highest).exp()).log()
