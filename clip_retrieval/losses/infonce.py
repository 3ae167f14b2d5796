"""InfoNCE, CLIP's loss (Radford et al. 2021, arXiv:2103.00020), with several positives per row.

With logits s_ij = logit_scale * cosine(image i, caption j), and P(i) the positives of image i:

    image to text:  mean over i of  log sum_j exp(s_ij) - mean over j in P(i) of s_ij
    text to image:  the same over the columns
    loss:           the mean of the two directions
"""

from __future__ import annotations

import torch
from torch import Tensor

from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.losses.pairs import count_positives, map_tiles, positive_cosines


def infonce(
    image_features: Tensor,
    text_features: Tensor,
    positives: Tensor,
    logit_scale: Tensor,
    processes: Processes = SINGLE_PROCESS,
) -> Tensor:
    """Compute the mean of the image-to-text and the text-to-image cross-entropy.

    The target of a row is uniform over its positives, so two captions of one image do not compete. Rows without a
    positive are skipped.

    Args:
        image_features: (images, dim), L2-normalised; of this process.
        text_features: (captions, dim), L2-normalised; of all processes.
        positives: int64 (P, 2), matching rows of image_features and text_features.
        logit_scale: the factor on the cosines (not its logarithm), a scalar.
        processes: the process group that shares the batch.

    Returns:
        The loss, a scalar; with several processes, the part of this process: the parts sum to the loss.
    """
    # Weights of rows and columns: each direction is a mean over those with a positive, and counts for one half.
    row, column = positives.T
    positives_of_row = count_positives(row, len(image_features))
    positives_of_column = processes.sum(count_positives(column, len(text_features)))
    rows = processes.sum((positives_of_row > 0).sum()).clamp(min=1)
    columns = (positives_of_column > 0).sum().clamp(min=1)
    row_weight = (positives_of_row > 0).to(image_features.dtype) / (2 * rows)
    column_weight = (positives_of_column > 0).to(image_features.dtype) / (2 * columns)

    # log sum exp of the logits over all pairs. Every process has all columns and counts 1 / world_size of them.
    row_sums, column_sums = _log_sums(image_features, text_features, logit_scale, processes)
    log_sums = row_weight @ row_sums + column_weight @ column_sums / processes.world_size

    # Mean logit of the positives of each row and column.
    weight = row_weight[row] / positives_of_row[row] + column_weight[column] / positives_of_column[column]
    return log_sums - weight @ (logit_scale * positive_cosines(image_features, text_features, positives))


def _log_sums(image: Tensor, text: Tensor, scale: Tensor, processes: Processes) -> tuple[Tensor, Tensor]:
    """Compute log sum exp of the logits of each row (images,), and of each column over all processes (captions,)."""

    def compute_tile(images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        logits = scale * (images @ texts.T)
        return logits.logsumexp(1), logits.logsumexp(0)

    tiles = map_tiles(compute_tile, image, text, scale)
    row_sums = torch.cat([torch.stack([by_row for by_row, _ in row]).logsumexp(0) for row in tiles])
    column_sums = [torch.stack([by_column for _, by_column in column]).logsumexp(0) for column in zip(*tiles)]
    return row_sums, processes.all_gather(torch.cat(column_sums)[None]).logsumexp(0)
