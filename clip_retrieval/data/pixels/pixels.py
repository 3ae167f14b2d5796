"""The pixels of a data set's images, resized for the model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from clip_retrieval.data.dataset import EncodedImages, Images
from clip_retrieval.data.images.decode import decode_rgb
from clip_retrieval.data.images.image_files import ImageArray
from clip_retrieval.data.pixels.augment import CROP_SCALE, CropTransform, make_augmentation
from clip_retrieval.data.pixels.jpeg import JpegBatch, JpegFile, JpegPixels, JpegTransform, collate
from clip_retrieval.data.pixels.transforms import evaluation_transform
from clip_retrieval.data.workers import default_num_workers

Indices = Sequence[int] | np.ndarray


class Pixels(Protocol):
    """The model's inputs for the images of a data set, by index."""

    in_memory: bool
    """Whether reading them needs no worker processes."""

    def __len__(self) -> int: ...

    def __call__(self, index: int, seed: int = 0) -> torch.Tensor | JpegFile:
        """Read an image: uint8 (3, height, width), or a file. `seed` decides the random crop, if any.

        Raises UserError, naming the image, if it cannot be read.
        """
        ...

    def batch(self, indices: Indices, seeds: Indices) -> torch.Tensor | JpegBatch:
        """Read n images: uint8 (n, 3, height, width), or files that the device decodes to that."""
        ...


def make_pixels(
    images: Images,
    preprocess: dict,
    *,
    augment: str = "none",
    crop_scale: float = CROP_SCALE,
    decoder: str = "pillow",
) -> Pixels:
    """Make pixels that are decoded and resized at each access.

    Args:
        images: the images.
        preprocess: open_clip's preprocessing, as a dict.
        augment, crop_scale: as in `ImageTransform`.
        decoder: "pillow", open_clip's pixels; "fast", within two grey levels of them (see `transforms`); or "gpu", the
            files, which the device decodes (see `jpeg`).
    """
    if decoder == "gpu" and isinstance(images, EncodedImages):
        return JpegPixels(images, JpegTransform(preprocess, augment=augment, crop_scale=crop_scale))
    decoder = "fast" if decoder == "gpu" else decoder
    transform = ImageTransform(preprocess, augment=augment, crop_scale=crop_scale, decoder=decoder)
    return _DecodedPixels(images, transform, in_memory=isinstance(images, ImageArray) and augment in ("none", "crop"))


def decodes_on_device(pixels: Pixels) -> bool:
    """Whether batches may have JPEG files, which the device decodes."""
    return any(isinstance(part, JpegPixels) for part in getattr(pixels, "parts", (pixels,)))


class MixedPixels:
    """The concatenated pixels of several data sets; each decodes or reads its cache as it does alone."""

    def __init__(self, parts: Sequence[Pixels]):
        self.parts = parts
        self.in_memory = all(part.in_memory for part in parts)
        self._first = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __call__(self, index: int, seed: int = 0) -> torch.Tensor | JpegFile:
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return self.parts[number](int(index - self._first[number]), seed)

    def batch(self, indices: Indices, seeds: Indices) -> torch.Tensor | JpegBatch:
        if decodes_on_device(self):
            return collate([self(int(index), int(seed)) for index, seed in zip(indices, seeds, strict=True)])
        indices, seeds = np.asarray(indices), np.asarray(seeds)
        part_numbers = np.searchsorted(self._first, indices, side="right") - 1
        batch = torch.empty(0)
        for number in np.unique(part_numbers):
            rows = np.flatnonzero(part_numbers == number)
            own = self.parts[number].batch((indices[rows] - self._first[number]).tolist(), seeds[rows].tolist())
            assert isinstance(own, torch.Tensor)
            if len(batch) == 0:
                batch = own.new_empty((len(indices), *own.shape[1:]))
            batch[torch.from_numpy(rows)] = own
        return batch


class ImageTransform:
    """Transform an RGB image to the model's input; a seed decides the random augmentation.

    Args:
        preprocess: open_clip's preprocessing, as a dict.
        augment: "none", "crop", "auto" (a random crop, then AutoAugment), "auto_flip" (half of them mirrored), or
            "rand" (a random crop, then RandAugment).
        crop_scale: the smallest share of the image's area in a crop.
        decoder: "pillow" or "fast", as in `make_pixels`.
    """

    def __init__(
        self, preprocess: dict, *, augment: str = "none", crop_scale: float = CROP_SCALE, decoder: str = "pillow"
    ):
        self._resize = evaluation_transform(preprocess, decoder)
        self._crop = None if augment == "none" else CropTransform(preprocess, decoder, crop_scale)
        self._augment = make_augmentation(augment)

    def read(self, content: bytes, name: str, seed: int = 0) -> torch.Tensor:
        """Decode the bytes of a file and transform the image. Raises UserError, naming it, if it cannot be read."""
        return self(decode_rgb(io.BytesIO(content), name), seed)

    def __call__(self, image: Image.Image, seed: int = 0) -> torch.Tensor:
        """uint8 (3, height, width)."""
        if self._crop is None:
            return self._resize(image)
        crop = self._crop(image, int(seed))
        return self._augment(crop, seed) if self._augment else crop


class _DecodedPixels:
    def __init__(self, images: Images, transform: ImageTransform, *, in_memory: bool):
        self.images = images
        self.in_memory = in_memory
        self._transform = transform

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
