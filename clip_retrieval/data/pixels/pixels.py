"""What the model sees of the images of a data set, by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy

from clip_retrieval.data.dataset import Images
from clip_retrieval.data.images.image_files import ImageArray
from clip_retrieval.data.pixels.transforms import CropTransform, evaluation_transform
from clip_retrieval.data.workers import usual_num_workers


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
        self._change = _SeededAutoAugment()

    def __len__(self) -> int:
        return len(self.crops)

    def __call__(self, index: int, seed: int = 0) -> torch.Tensor:
        return self._change(self.crops(index, seed), seed)

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        return torch.stack([self(index, seed) for index, seed in zip(indices, seeds, strict=True)])


class MixedPixels:
    """The pixels of several data sets, one after the other: each decodes, or reads its cache, as it does alone."""

    def __init__(self, parts: Sequence[Pixels]):
        self.parts = parts
        self.in_memory = all(part.in_memory for part in parts)
        self._first = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __call__(self, index: int, seed: int = 0) -> torch.Tensor:
        return self.batch([index], [seed])[0]

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        indices, seeds = np.asarray(indices), np.asarray(seeds)
        part_of = np.searchsorted(self._first, indices, side="right") - 1
        batch = None
        for number in np.unique(part_of):
            rows = np.flatnonzero(part_of == number)
            own = self.parts[number].batch((indices[rows] - self._first[number]).tolist(), seeds[rows].tolist())
            if batch is None:
                batch = own.new_empty((len(indices), *own.shape[1:]))
            batch[torch.from_numpy(rows)] = own
        return batch


class _SeededAutoAugment:
    def __init__(self) -> None:
        self._change = AutoAugment(AutoAugmentPolicy.IMAGENET, InterpolationMode.BILINEAR)

    def __call__(self, crop: torch.Tensor, seed: int) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed))
            return self._change(crop)


class ImageTransform:
    """From an RGB image, and the seed of what is random, to what the model sees.

    Args:
        preprocess: open_clip's preprocessing, as a dict.
        augment: "none", "crop", or "auto" (a random crop, changed by AutoAugment).
        decoder: "pillow" or "fast", as in `make_pixels`.
    """

    def __init__(self, preprocess: dict, *, augment: str = "none", decoder: str = "pillow"):
        self._resize = evaluation_transform(preprocess, decoder)
        self._crop = None if augment == "none" else CropTransform(preprocess, decoder)
        self._change = _SeededAutoAugment() if augment == "auto" else None

    def __call__(self, image: Image.Image, seed: int = 0) -> torch.Tensor:
        """uint8 (3, height, width)."""
        if self._crop is None:
            return self._resize(image)
        crop = self._crop(image, int(seed))
        return self._change(crop, seed) if self._change else crop


class _DecodedPixels:
    def __init__(self, images: Images, preprocess: dict, augment: str, decoder: str):
        self.images = images
        self.in_memory = isinstance(images, ImageArray)
        self._transform = ImageTransform(preprocess, augment=augment, decoder=decoder)

    def __len__(self) -> int:
        return len(self.images)

    def __call__(self, index: int, seed: int = 0) -> torch.Tensor:
        return self._transform(self.images[index], seed)

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        return torch.stack([self(index, seed) for index, seed in zip(indices, seeds, strict=True)])


def choose_num_workers(asked: int | None, pixels: Pixels, device: torch.device) -> int:
    """`asked`, or what suits the images and the device: none where the images are in memory already."""
    if asked is not None:
        return asked
    return 0 if pixels.in_memory else usual_num_workers(device)
