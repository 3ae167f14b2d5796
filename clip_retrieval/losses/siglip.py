"""The pairwise sigmoid loss of SigLIP (Zhai et al. 2023, arXiv:2303.15343)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def siglip(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    positives: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
) -> torch.Tensor:
    """-log sigmoid(z (scale * cosine + bias)), summed over all pairs, over the number of images.

    z is 1 for a positive pair and -1 for the others.

    Args:
        image_features: (images, dim), L2-normalised.
        text_features: (captions, dim), L2-normalised.
        positives: bool (images, captions).
        logit_scale: the factor on the cosines (not its logarithm), a scalar.
        logit_bias: a scalar.

    Returns:
        The loss, a scalar.
    """
    logits = logit_scale * image_features @ text_features.T + logit_bias
    return -F.logsigmoid(torch.where(positives, logits, -logits)).sum() / len(image_features)
