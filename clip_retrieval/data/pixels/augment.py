"""Augment training images: a random crop, then AutoAugment or RandAugment. A seed decides every draw.

The crop is taken from a decoded image or from the image cache, and the other steps change the cropped pixels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from PIL import Image
from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy, InterpolationMode, RandAugment

from clip_retrieval.data.pixels.transforms import interpolation_mode, model_size, resize

CROP_SCALE = 0.9  # smallest share of the image's area, as in open_clip's training
CROP_RATIO = (3 / 4, 4 / 3)  # width / height, torchvision's default

Augmentation = Callable[[torch.Tensor, int], torch.Tensor]
"""augmentation(pixels, seed): uint8 (3, height, width) to the same shape."""


def make_augmentation(augment: str) -> Augmentation | None:
    """Make the steps of --augment that follow the crop; None for "none" and "crop".

    "auto" and "auto_flip" are AutoAugment's policies for ImageNet (arXiv:1805.09501), "rand" is RandAugment
    (arXiv:1909.13719) with torchvision's two operations of magnitude 9 of 30. Neither mirrors.
    """
    if augment == "rand":
        return _Seeded(RandAugment(interpolation=InterpolationMode.BILINEAR))
    if augment in ("auto", "auto_flip"):
        return _Seeded(AutoAugment(AutoAugmentPolicy.IMAGENET, InterpolationMode.BILINEAR), augment == "auto_flip")
    return None


class CropTransform:
    """A random crop of the image, resized to the model's size. No flip: captions name left and right.

    The regions have the distribution of torchvision's RandomResizedCrop, whose sampling is slower than the resizing.
    """

    def __init__(self, preprocess: dict, decoder: str = "pillow", crop_scale: float = CROP_SCALE):
        self.crop_scale = crop_scale
        self.size = model_size(preprocess)
        self.decoder = decoder
        self.interpolation = interpolation_mode(preprocess)

    def __call__(self, image: Image.Image, seed: int) -> torch.Tensor:
        """Crop and resize: uint8 (3, height, width). The same seed gives the same crop in every process."""
        left, top, right, bottom = crop_region(image.width, image.height, seed, self.crop_scale)
        return resize(image.crop((left, top, right, bottom)), self.size, self.decoder, self.interpolation)


def crop_region(width: int, height: int, seed: int, crop_scale: float = CROP_SCALE) -> tuple[int, int, int, int]:
    """Draw a random crop of an image of this size, with at least `crop_scale` of its area: (left, top, right, bottom).

    Few images have no such crop with an allowed ratio: they get the largest central one.
    """
    draw = random.Random(seed)
    for _ in range(10):
        area = width * height * draw.uniform(crop_scale, 1.0)
        ratio = math.exp(draw.uniform(*map(math.log, CROP_RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randrange(width - w + 1), draw.randrange(height - h + 1)
            return left, top, left + w, top + h
    # None fits: the largest central region with an allowed ratio.
    ratio = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class _Seeded:
    """Draws the random numbers of an augmentation from a seed; `flip` mirrors half of the images."""

    def __init__(self, augment: Callable[[torch.Tensor], torch.Tensor], flip: bool = False) -> None:
        self._augment = augment
        self._flip = flip

    def __call__(self, pixels: torch.Tensor, seed: int) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed))
            augmented = self._augment(pixels)  # draws first, so that the flip changes nothing else
            return augmented.flip(-1) if self._flip and torch.rand(()) < 0.5 else augmented
