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
    """-log sigmoid(z (scale * cosine + bias)), summed over all pairs, over the number of images.

    z is 1 for a positive pair and -1 for the others.

    Args:
        image_features: (images, dim), L2-normalised; with several processes, this one's, as many in each.
        text_features: (captions, dim), L2-normalised; with several processes, those of all.
        positives: int64 (P, 2), rows of image_features and text_features that belong together.
        logit_scale: the factor on the cosines (not its logarithm), a scalar.
        logit_bias: a scalar.
        processes: those that share the batch.

    Returns:
        The loss, a scalar; with several processes, this one's part of it: the loss is their sum.
    """

    def as_negatives(logits: Tensor, *_: slice) -> tuple[Tensor, Tensor]:
        return F.softplus(logits).sum(), logits.sigmoid()

    # -log sigmoid(l) is -log sigmoid(-l) - l: what a positive pair costs, from what it would cost as a negative.
    cosines = positive_cosines(image_features, text_features, positives)
    logits_of_positives = logit_scale * cosines.sum() + logit_bias * len(positives)
    total = sum_over_pairs(image_features, text_features, logit_scale, logit_bias, as_negatives) - logits_of_positives
    return total / (len(image_features) * processes.world_size)
