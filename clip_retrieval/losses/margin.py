"""The margin-pairwise loss of Clip_crossmodal_retrieval: no temperature, suited to small batches."""

from __future__ import annotations

from torch import Tensor

from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.losses.pairs import positive_cosines, sum_over_pairs


def margin_pairwise(
    image_features: Tensor,
    text_features: Tensor,
    positives: Tensor,
    margin: float = 0.1,
    processes: Processes = SINGLE_PROCESS,
) -> Tensor:
    """Compute the mean over all pairs: 0.5 (1 - cosine) for positives, 0.5 max(0, cosine - margin) for negatives.

    Args:
        image_features: (images, dim), L2-normalised; of this process, with equal numbers in all processes.
        text_features: (captions, dim), L2-normalised; of all processes.
        positives: int64 (P, 2), matching rows of image_features and text_features.
        margin: cosine below which a negative pair has no loss.
        processes: the process group that shares the batch.

    Returns:
        The loss, a scalar; with several processes, the part of this process: the parts sum to the loss.
    """

    def negative_loss(cosines: Tensor) -> Tensor:
        return (cosines - margin).clamp(min=0)

    # Count every pair as a negative, then correct the positives.
    total = sum_over_pairs(negative_loss, image_features, text_features)
    cosines = positive_cosines(image_features, text_features, positives)
    total = total + ((1 - cosines) - negative_loss(cosines)).sum()
    return 0.5 * total / (len(image_features) * processes.world_size * len(text_features))
