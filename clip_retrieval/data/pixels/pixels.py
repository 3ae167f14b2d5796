"""The pixels of a data set's images, resized for the model."""

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
from clip_retrieval.data.workers import default_num_workers

Indices = Sequence[int] | np.ndarray


class Pixels(Protocol):
    """The model's inputs for the images of a data set, by index."""

    in_memory: bool
    """Whether reading them needs no worker processes."""

    def __len__(self) -> int: ...

    def __call__(self, index: int, seed: int = 0) -> torch.Tensor:
        """Read an image: uint8 (3, height, width). `seed` decides the random crop, if any.

        Raises UserError, naming the image, if it cannot be read.
        """
        ...

    def batch(self, indices: Indices, seeds: Indices) -> torch.Tensor:
        """Read n images: uint8 (n, 3, height, width)."""
        ...


def make_pixels(images: Images, preprocess: dict, *, augment: str = "none", decoder: str = "pillow") -> Pixels:
    """Make pixels that are decoded and resized at each access.

    Args:
        images: the images.
        preprocess: open_clip's preprocessing, as a dict.
        augment: "none" (as in evaluation) or "crop" (a random crop).
        decoder: "pillow", open_clip's pixels, or "fast", within two grey levels of them (see `transforms`).
    """
    return _DecodedPixels(images, preprocess, augment, decoder)


class AutoAugmented:
    """Random crops with AutoAugment's policies for ImageNet (arXiv:1805.09501); `flip` mirrors half of them."""

    def __init__(self, crops: Pixels, *, flip: bool = False):
        self.crops = crops
        self.in_memory = False  # worker processes do the augmentation
        self._augment = _SeededAutoAugment(flip)

    def __len__(self) -> int:
        return len(self.crops)

    def __call__(self, index: int, seed: int = 0) -> torch.Tensor:
        return self._augment(self.crops(index, seed), seed)

    def batch(self, indices: Indices, seeds: Indices) -> torch.Tensor:
        return torch.stack([self(index, seed) for index, seed in zip(indices, seeds, strict=True)])


class MixedPixels:
    """The concatenated pixels of several data sets; each decodes or reads its cache as it does alone."""

    def __init__(self, parts: Sequence[Pixels]):
        self.parts = parts
        self.in_memory = all(part.in_memory for part in parts)
        self._first = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __call__(self, index: int, seed: int = 0) -> torch.Tensor:
        return self.batch([index], [seed])[0]

    def batch(self, indices: Indices, seeds: Indices) -> torch.Tensor:
        indices, seeds = np.asarray(indices), np.asarray(seeds)
        part_numbers = np.searchsorted(self._first, indices, side="right") - 1
        batch = torch.empty(0)
        for number in np.unique(part_numbers):
            rows = np.flatnonzero(part_numbers == number)
            own = self.parts[number].batch((indices[rows] - self._first[number]).tolist(), seeds[rows].tolist())
            if len(batch) == 0:
                batch = own.new_empty((len(indices), *own.shape[1:]))
            batch[torch.from_numpy(rows)] = own
        return batch


class _SeededAutoAugment:
    def __init__(self, flip: bool) -> None:
        self._augment = AutoAugment(AutoAugmentPolicy.IMAGENET, InterpolationMode.BILINEAR)
        self._flip = flip

    def __call__(self, crop: torch.Tensor, seed: int) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed))
            augmented = self._augment(crop)  # draws first, so that the flip changes nothing else
            return augmented.flip(-1) if self._flip and torch.rand(()) < 0.5 else augmented


class ImageTransform:
    """Transform an RGB image to the model's input; a seed decides the random augmentation.

    Args:
        preprocess: open_clip's preprocessing, as a dict.
        augment: "none", "crop", "auto" (a random crop, then AutoAugment), or "auto_flip" (half of them mirrored).
        decoder: "pillow" or "fast", as in `make_pixels`.
    """

    def __init__(self, preprocess: dict, *, augment: str = "none", decoder: str = "pillow"):
        self._resize = evaluation_transform(preprocess, decoder)
        self._crop = None if augment == "none" else CropTransform(preprocess, decoder)
        self._augment = _SeededAutoAugment(augment == "auto_flip") if augment.startswith("auto") else None

    def __call__(self, image: Image.Image, seed: int = 0) -> torch.Tensor:
        """uint8 (3, height, width)."""
        if self._crop is None:
            return self._resize(image)
        crop = self._crop(image, int(seed))
        return self._augment(crop, seed) if self._augment else crop


class _DecodedPixels:
    def __init__(self, images: Images, preprocess: dict, augment: str, decoder: str):
        self.images = images
        self.in_memory = isinstance(images, ImageArray)
        self._transform = ImageTransform(preprocess, augment=augment, decoder=decoder)

    def __len__(self) -> int:
        return len(self.images)

    def __call__(self, index: int, seed: int = 0) -> torch.Tensor:
        return self._transform(self.images[index], seed)

    def batch(self, indices: Indices, seeds: Indices) -> torch.Tensor:
        return torch.stack([self(index, seed) for index, seed in zip(indices, seeds, strict=True)])


def choose_num_workers(requested: int | None, pixels: Pixels, device: torch.device) -> int:
    """Return the number of workers: `requested` if given, 0 for images in memory, else the device's default."""
    if requested is not None:
        return requested
    return 0 if pixels.in_memory else default_num_workers(device)
