"""What the model sees of the images of a data set, by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy

from clip_retrieval.data.dataset import Images
from clip_retrieval.data.images import ImageArray
from clip_retrieval.data.preprocess import CropTransform, evaluation_transform


class Pixels(Protocol):
    """What the model sees of the images of a data set, by index."""

    in_memory: bool
    """No worker processes are needed to read them."""

    def __len__(self) -> int: ...

    def __call__(self, index: int, seed: int = 0) -> torch.Tensor:
        """uint8 (3, height, width). `seed` decides the random crop, where there is one.

        Raises UserError, naming the image, where it cannot be read.
        """
        ...

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        """uint8 (n, 3, height, width) of n images, one by one or faster."""
        ...


def make_pixels(images: Images, preprocess: dict, *, augment: str = "none", decoder: str = "pillow") -> Pixels:
    """Pixels that are decoded and resized whenever they are asked for.

    Args:
        images: the images.
        preprocess: open_clip's preprocessing, as a dict.
        augment: "none" (as in evaluation) or "crop" (a random crop).
        decoder: "pillow", the reference's pixels, or "fast", one or two grey levels from them (see `preprocess`).
    """
    return _DecodedPixels(images, preprocess, augment, decoder)


class AutoAugmented:
    """Random crops, changed by one of AutoAugment's policies for ImageNet (arXiv:1805.09501), which never mirrors."""

    def __init__(self, crops: Pixels):
        self.crops = crops
        self.in_memory = False  # work for other processes
        self._change = AutoAugment(AutoAugmentPolicy.IMAGENET, InterpolationMode.BILINEAR)

    def __len__(self) -> int:
        return len(self.crops)

    def __call__(self, index: int, seed: int = 0) -> torch.Tensor:
        crop = self.crops(index, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed))
            return self._change(crop)

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        return torch.stack([self(index, seed) for index, seed in zip(indices, seeds, strict=True)])


class _DecodedPixels:
    def __init__(self, images: Images, preprocess: dict, augment: str, decoder: str):
        self.images = images
        self.in_memory = isinstance(images, ImageArray)
        self._crop = CropTransform(preprocess, decoder) if augment == "crop" else None
        self._resize = evaluation_transform(preprocess, decoder)

    def __len__(self) -> int:
        return len(self.images)

    def __call__(self, index: int, seed: int = 0) -> torch.Tensor:
        image = self.images[index]
        return self._crop(image, int(seed)) if self._crop else self._resize(image)

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        return torch.stack([self(index, seed) for index, seed in zip(indices, seeds, strict=True)])
