"""The pairwise sigmoid loss of SigLIP (Zhai et al. 2023, arXiv:2303.15343)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.losses.pairs import positive_cosines, sum_over_pairs


def siglip(
    image_features: Tensor,
    text_features: Tensor,
    positives: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    processes: Processes = SINGLE_PROCESS,
) -> Tensor:
    """Compute the sum over all pairs of -log sigmoid(z (scale * cosine + bias)), divided by the number of images.

    z is 1 for positive pairs and -1 for negative pairs.

    Args:
        image_features: (images, dim), L2-normalised; of this process, with equal numbers in all processes.
        text_features: (captions, dim), L2-normalised; of all processes.
        positives: int64 (P, 2), matching rows of image_features and text_features.
        logit_scale: the factor on the cosines (not its logarithm), a scalar.
        logit_bias: a scalar.
        processes: the process group that shares the batch.

    Returns:
        The loss, a scalar; with several processes, the part of this process: the parts sum to the loss.
    """
    # Count every pair as a negative: -log sigmoid(-l) = softplus(l).
    total = sum_over_pairs(_softplus_of_logits, image_features, text_features, logit_scale, logit_bias)
    # Correct the positives: -log sigmoid(l) = softplus(l) - l.
    cosines = positive_cosines(image_features, text_features, positives)
    total = total - (logit_scale * cosines.sum() + logit_bias * len(positives))
    return total / (len(image_features) * processes.world_size)


def _softplus_of_logits(cosines: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.softplus(scale * cosines + bias)
