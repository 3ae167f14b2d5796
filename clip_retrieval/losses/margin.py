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
    """Compute 0.5 (1 - cosine) for pairs that match, 0.5 max(0, cosine - margin) for the rest; mean over all pairs.

    Args:
        image_features: (images, dim), L2-normalised; with several processes, this one's, as many in each.
        text_features: (captions, dim), L2-normalised; with several processes, those of all.
        positives: int64 (P, 2), rows of image_features and text_features that belong together.
        margin: cosine below which a pair that does not match costs nothing.
        processes: those that share the batch.

    Returns:
        The loss, a scalar; with several processes, this one's part of it: the loss is their sum.
    """

    def cost_of_negatives(cosines: Tensor) -> Tensor:
        return (cosines - margin).clamp(min=0)

    # Every pair as a negative, then the difference that a positive makes.
    total = sum_over_pairs(cost_of_negatives, image_features, text_features)
    cosines = positive_cosines(image_features, text_features, positives)
    total = total + ((1 - cosines) - cost_of_negatives(cosines)).sum()
    return 0.5 * total / (len(image_features) * processes.world_size * len(text_features))
