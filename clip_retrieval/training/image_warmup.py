"""Resolution warm-up: the first steps of a run see reduced images ("train small, finish large").

Touvron et al. 2019 (arXiv:1906.06423) finish at a higher resolution; CLIPA (Li et al. 2023, arXiv:2305.07017) does so
for CLIP.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from clip_retrieval.data.batches.loader import TrainBatch

IMAGES = 256  # reduced at a time: on a GPU, they take the memory of float32 pixels


@dataclass(frozen=True)
class ImageWarmup:
    """The size of the images in the first steps.

    Attributes:
        size: height and width.
        steps: the last step that sees it.
    """

    size: tuple[int, int]
    steps: int

    def reduce(self, batch: TrainBatch, step: int) -> TrainBatch:
        """Return the batch that the step sees. Steps count from 1."""
        if step > self.steps:
            return batch
        parts = [
            F.resize(images, list(self.size), InterpolationMode.BICUBIC, antialias=True)
            for images in batch.images.split(IMAGES)
        ]
        return replace(batch, images=torch.cat(parts))
