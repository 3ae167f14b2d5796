"""InfoNCE, CLIP's loss (Radford et al. 2021, arXiv:2103.00020), with several positives per row."""

from __future__ import annotations

import torch


def infonce(
    image_features: torch.Tensor, text_features: torch.Tensor, positives: torch.Tensor, logit_scale: torch.Tensor
) -> torch.Tensor:
    """The mean of the image-to-text and the text-to-image cross-entropy.

    The target of a row is spread evenly over its positives, so two captions of one image do not compete. A row
    without a positive does not count.

    Args:
        image_features: (images, dim), L2-normalised.
        text_features: (captions, dim), L2-normalised.
        positives: bool (images, captions).
        logit_scale: the factor on the cosines (not its logarithm), a scalar.

    Returns:
        The loss, a scalar.
    """
    logits = logit_scale * image_features @ text_features.T
    return (_cross_entropy(logits, positives) + _cross_entropy(logits.T, positives.T)) / 2


def _cross_entropy(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    count = positives.sum(dim=1)
    log_probability = logits.log_softmax(dim=1).masked_fill(~positives, 0).sum(dim=1)
    return -(log_probability / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)
