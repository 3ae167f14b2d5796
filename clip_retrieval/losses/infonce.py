"""InfoNCE, CLIP's loss (Radford et al. 2021, arXiv:2103.00020), with several positives per row.

With logits s_ij = logit_scale * cosine(image i, caption j), and P(i) the positives of image i:

    image to text:  mean over i of  log sum_j exp(s_ij) - mean over j in P(i) of s_ij
    text to image:  the same over the columns
    loss:           the mean of the two directions, or weighted

With label smoothing E (Szegedy et al. 2016, arXiv:1512.00567), the target of a row is 1 - E on its positives and E
spread over all captions: the mean over P(i) becomes (1 - E) mean over P(i) + E mean over all j.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.losses.pairs import count_directions, map_tiles, positive_cosines


def infonce(
    image_features: Tensor,
    text_features: Tensor,
    positives: Tensor,
    logit_scale: Tensor,
    label_smoothing: float = 0.0,
    i2t_weight: float = 0.5,
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
        label_smoothing: share of the target that is spread over all rows, positives included.
        i2t_weight: weight of the image-to-text direction; the other one has the rest.
        processes: the process group that shares the batch.

    Returns:
        The loss, a scalar; with several processes, the part of this process: the parts sum to the loss.
    """
    # Weights of rows and columns: each direction is a mean over those with a positive.
    row, column = positives.T
    counts = count_directions(positives, len(image_features), len(text_features), processes)
    positives_of_row, positives_of_column, rows, columns = counts
    row_weight = i2t_weight * (positives_of_row > 0).to(image_features.dtype) / rows
    column_weight = (1 - i2t_weight) * (positives_of_column > 0).to(image_features.dtype) / columns

    # log sum exp of the logits over all pairs. Every process has all columns and counts 1 / world_size of them.
    row_sums, column_sums = log_sums(image_features, text_features, logit_scale, processes)
    total = row_weight @ row_sums + column_weight @ column_sums / processes.world_size

    # Mean logit of the positives of each row and column.
    weight = row_weight[row] / positives_of_row[row] + column_weight[column] / positives_of_column[column]
    target_logits = weight @ (logit_scale * positive_cosines(image_features, text_features, positives))
    if not label_smoothing:
        return total - target_logits

    # The mean logit of a row is the product of its features with the mean features of the columns.
    row_means = (row_weight @ image_features) @ text_features.mean(0)
    images = len(image_features) * processes.world_size
    column_means = (column_weight @ text_features) @ (image_features.sum(0) / images)
    spread = logit_scale * (row_means + column_means)
    return total - (1 - label_smoothing) * target_logits - label_smoothing * spread


def log_sums(image: Tensor, text: Tensor, scale: Tensor, processes: Processes) -> tuple[Tensor, Tensor]:
    """Compute log sum exp of the logits of each row (images,), and of each column over all processes (captions,)."""

    def compute_tile(images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        logits = scale * (images @ texts.T)
        return logits.logsumexp(1), logits.logsumexp(0)

    tiles = map_tiles(compute_tile, image, text, scale)
    row_sums = torch.cat([torch.stack([by_row for by_row, _ in row]).logsumexp(0) for row in tiles])
    column_sums = [torch.stack([by_column for _, by_column in column]).logsumexp(0) for column in zip(*tiles)]
    return row_sums, processes.all_gather(torch.cat(column_sums)[None]).logsumexp(0)
