"""The margin-pairwise loss of Clip_crossmodal_retrieval: no temperature, suited to small batches."""

from __future__ import annotations

import torch


def margin_pairwise(
    image_features: torch.Tensor, text_features: torch.Tensor, positives: torch.Tensor, margin: float = 0.1
) -> torch.Tensor:
    """0.5 (1 - cosine) for pairs that match, 0.5 max(0, cosine - margin) for the rest; the mean over all pairs.

    Args:
        image_features: (images, dim), L2-normalised.
        text_features: (captions, dim), L2-normalised.
        positives: bool (images, captions).
        margin: cosine below which a pair that does not match costs nothing.

    Returns:
        The loss, a scalar.
    """
    cosine = image_features @ text_features.T
    return 0.5 * torch.where(positives, 1 - cosine, (cosine - margin).clamp(min=0)).mean()
