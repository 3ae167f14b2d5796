"""A cache of decoded and resized images: one uint8 file that all later epochs and runs read.

    DIR/coco_train_0123456789ab.pixels      17 GB for the 113,287 training images of COCO at 224 x 224

The file's name has a hash of everything that decides its content: the list of images, the resizing, and the versions of
the libraries. Each start checks that the image files are unchanged. Runs may share a folder: one builds, others wait.
The next run resumes an interrupted build.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image

from clip_retrieval.data.dataset import StoredImages
from clip_retrieval.data.pixels.augment import CROP_SCALE, Augmentation, crop_region, make_augmentation
from clip_retrieval.data.pixels.cache_file import RECORD, PartialFile, PixelFile, open_partial, read_records
from clip_retrieval.data.pixels.pixels import Indices, Pixels
from clip_retrieval.data.pixels.transforms import (
    evaluation_transform,
    interpolation_mode,
    model_size,
    resize,
    size_for_crops,
)
from clip_retrieval.data.workers import map_in_workers
from clip_retrieval.errors import RunError, UserError, format_counts, format_share
from clip_retrieval.log import log, progress_bar

FORMAT = 1
IMAGES_PER_REQUEST = 16  # images that a worker decodes at a time
SAMPLE = 64  # images from which the size of a cache for crops is estimated


def open_cached_pixels(
    images: StoredImages,
    preprocess: dict,
    folder: Path,
    name: str,
    *,
    augment: str = "none",
    crop_scale: float = CROP_SCALE,
    decoder: str = "pillow",
    num_workers: int,
) -> Pixels:
    """Open the cache of `images` in `folder`; build it first if it is missing or outdated.

    With augment "none" the pixels equal those of `make_pixels` bit for bit. For crops the cache stores whole images,
    with short sides of at most 8/7 of the model's size, and the same regions are cropped from them.

    Args:
        images: the images.
        preprocess: open_clip's preprocessing, as a dict.
        folder: folder of the caches; created if it is missing.
        name: prefix of the file's name.
        augment, crop_scale: as in `ImageTransform`.
        decoder: "pillow" or "fast", as in `make_pixels`.
        num_workers: worker processes that decode during a build.

    Raises:
        UserError: an image cannot be read, or the folder cannot be written or is too small.
        RunError: writing stopped before the end; the finished part is kept.
    """
    storage: _ResizedStorage | _CropStorage
    if augment == "none":
        storage = _ResizedStorage(preprocess, decoder)
    else:
        storage = _CropStorage(preprocess, decoder, crop_scale, make_augmentation(augment))
    path = folder / f"{name}_{_hash_content(images, storage.settings)}.pixels"
    stamps = np.array([images.stamp(i) for i in range(len(images))], dtype=np.int64)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while not _is_current(path, stamps, storage):
            with open_partial(path, len(images), partial(_log_waiting, path)) as file:
                # Another run may have finished it between the check and the lock.
                if file is not None and _is_current(path, stamps, storage):
                    file.discard()
                elif file is not None:
                    _build(file, images, storage, stamps, num_workers)
        size = path.stat().st_size
    except OSError as error:
        place = f"{Path(error.filename).name}: " if error.filename not in (None, str(folder)) else ""
        raise UserError(
            f"--image_cache {folder}: cannot be used ({place}{error.strerror}); choose a folder that can be written "
            "and locked"
        ) from error
    log.info(f"image cache: {path} ({format_counts(image=len(images))}, {_format_gb(size)})")
    return storage.open(path, len(images))


def _log_waiting(path: Path) -> None:
    log.info(f"image cache: another run is building {path}, waiting for it")


def _hash_content(images: StoredImages, settings: dict) -> str:
    versions = {"format": FORMAT, "pillow": PIL.__version__}
    if settings["decoder"] == "fast":
        versions["torch"] = torch.__version__
    content = hashlib.sha256(json.dumps([versions, settings], sort_keys=True).encode())
    for i in range(len(images)):
        content.update(os.path.abspath(images.name(i)).encode(errors="surrogatepass") + b"\0")  # noqa: PTH100
    return content.hexdigest()[:12]


def _is_current(path: Path, stamps: np.ndarray, storage: _ResizedStorage | _CropStorage) -> bool:
    records = read_records(path, len(stamps))
    return records is not None and bool((_is_unchanged(records, stamps) & storage.matches(records)).all())


def _is_unchanged(records: np.ndarray, stamps: np.ndarray) -> np.ndarray:
    return (records["source_bytes"] == stamps[:, 0]) & (records["source_changed"] == stamps[:, 1])


def _build(
    file: PartialFile, images: StoredImages, storage: _ResizedStorage | _CropStorage, stamps: np.ndarray, workers: int
) -> None:
    _log_rebuild_reason(file.path, stamps)
    # resume after the images that are current
    is_usable = _is_unchanged(file.records, stamps[: len(file.records)]) & storage.matches(file.records)
    done = int(np.cumprod(is_usable).sum())
    _check_space(file, images, storage, done)
    # decode and append the others
    starts = range(done, len(images), IMAGES_PER_REQUEST)
    parts = [range(start, min(start + IMAGES_PER_REQUEST, len(images))) for start in starts]
    decode = _DecodeImages(images, storage)
    try:
        file.keep_first(done)
        try:
            with progress_bar(total=len(images), initial=done, desc="image cache", leave=False) as bar:
                for part, (pixels, sizes) in zip(parts, map_in_workers(decode, parts, num_workers=workers)):
                    records = np.array([(*size, *stamps[i]) for i, size in zip(part, sizes)], RECORD)
                    file.append(pixels.numpy(), records)
                    bar.update(len(part))
        finally:
            file.flush()  # a damaged image, a lost worker or Ctrl-C must not lose decoded images
        file.finish()
    except OSError as error:
        raise RunError(
            f"building {file.path} stopped: {error.strerror}; {format_share(len(file.records), len(images), 'image')} "
            "kept; fix this, and the same command resumes there"
        ) from error


def _log_rebuild_reason(path: Path, stamps: np.ndarray) -> None:
    if not path.exists():
        return
    records = read_records(path, len(stamps))
    changed = 0 if records is None else np.count_nonzero(~_is_unchanged(records, stamps))
    if not changed:
        log.info(f"image cache: {path} is incomplete or damaged; rebuilding it")
    else:
        log.info(f"image cache: {format_counts(image=int(changed))} changed since {path} was built; rebuilding it")


def _check_space(file: PartialFile, images: StoredImages, storage: _ResizedStorage | _CropStorage, done: int) -> None:
    """Log the size of the cache. Raises UserError if the disk clearly has too little free space."""
    size, is_exact = storage.estimate_bytes(images)
    about, resumed = "" if is_exact else "about ", f", {done:,} of them are done" if done else ""
    log.info(
        f"image cache: building {file.path}: {format_counts(image=len(images))}, {about}{_format_gb(size)}{resumed}"
    )
    missing = size * (len(images) - done) // len(images)
    free = shutil.disk_usage(file.path.parent).free
    if missing * (1 if is_exact else 0.8) > free:
        if not done:
            file.discard()
        raise UserError(
            f"--image_cache {file.path.parent}: needs {_format_gb(missing)}, and {_format_gb(free)} are free; free "
            "some space, or choose another folder"
        )


def _format_gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


class _DecodeImages:
    """Decodes and resizes the images of a request in a worker."""

    def __init__(self, images: StoredImages, storage: _ResizedStorage | _CropStorage):
        self.images = images
        self.storage = storage

    def __call__(self, indices: range) -> tuple[torch.Tensor, list[tuple[int, int, int, int]]]:
        """The concatenated bytes of the images, and for each (height, width, source height, source width)."""
        pixels, sizes = [], []
        for index in indices:
            image = self.images[index]
            stored, height, width = self.storage(image)
            pixels.append(stored.reshape(-1))
            sizes.append((height, width, image.height, image.width))
        return torch.cat(pixels), sizes


class _ResizedStorage:
    """Stores images as the model's inputs, channels first: a batch is read directly from the file."""

    def __init__(self, preprocess: dict, decoder: str):
        self.size = model_size(preprocess)
        names = ("size", "resize_size", "interpolation", "resize_mode", "fill_color")
        self.settings = {"decoder": decoder} | {name: preprocess[name] for name in names if name in preprocess}
        self._transform = evaluation_transform(preprocess, decoder)

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, int, int]:
        return self._transform(image), *self.size

    def estimate_bytes(self, images: StoredImages) -> tuple[int, bool]:
        """The images' bytes in the file, and whether the number is exact."""
        return len(images) * 3 * self.size[0] * self.size[1], True

    def matches(self, records: np.ndarray) -> np.ndarray:
        """bool (images,): whether the records have this size."""
        return (records["height"] == self.size[0]) & (records["width"] == self.size[1])

    def open(self, path: Path, images: int) -> Pixels:
        return _ResizedPixels(PixelFile(path, images), self.size)


class _CropStorage:
    """Stores whole images, slightly larger than the model's inputs, channels last as `resize` takes them."""

    def __init__(self, preprocess: dict, decoder: str, crop_scale: float, augmentation: Augmentation | None):
        self.preprocess = preprocess
        self.decoder = decoder
        self.crop_scale = crop_scale
        self.augmentation = augmentation
        self.settings = {"decoder": decoder, "crop": True, "size": preprocess["size"]}

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, int, int]:
        height, width = self._size(image)
        return resize(image, (height, width), self.decoder).permute(1, 2, 0), height, width

    def _size(self, image: Image.Image) -> tuple[int, int]:
        return size_for_crops(image.width, image.height, self.preprocess)

    def estimate_bytes(self, images: StoredImages) -> tuple[int, bool]:
        sample = np.linspace(0, len(images) - 1, min(SAMPLE, len(images))).astype(int)
        sizes = [3 * np.prod(self._size(images[i])) for i in sample]
        return int(np.mean(sizes) * len(images)), False

    def matches(self, records: np.ndarray) -> np.ndarray:
        """bool (images,): whether the records have the sizes that follow from their sources."""
        height, width = (records[f"source_{name}"].astype(np.int64) for name in ("height", "width"))
        expected = [size_for_crops(w, h, self.preprocess) for w, h in zip(width.tolist(), height.tolist())]
        return (np.array(expected).reshape(-1, 2) == np.stack([records["height"], records["width"]], 1)).all(1)

    def open(self, path: Path, images: int) -> Pixels:
        return _CroppedPixels(PixelFile(path, images), self)


class _ResizedPixels:
    in_memory = True

    def __init__(self, file: PixelFile, size: tuple[int, int]):
        self._file = file
        self._shape = (len(file), 3, *size)

    def __len__(self) -> int:
        return len(self._file)

    def __call__(self, index: int, seed: int = 0) -> torch.Tensor:
        return torch.from_numpy(self._file[index].reshape(self._shape[1:]))

    def batch(self, indices: Indices, seeds: Indices) -> torch.Tensor:
        self._file.will_read(indices)
        pixels = np.empty((len(indices), *self._shape[1:]), np.uint8)
        for row, index in enumerate(indices):
            self._file.read_into(pixels[row], index)
        return torch.from_numpy(pixels)


class _CroppedPixels:
    in_memory = False  # worker processes resize the crops

    def __init__(self, file: PixelFile, storage: _CropStorage):
        self._file = file
        self._size = model_size(storage.preprocess)
        self._decoder = storage.decoder
        self._crop_scale = storage.crop_scale
        self._augment = storage.augmentation
        self._interpolation = interpolation_mode(storage.preprocess)

    def __len__(self) -> int:
        return len(self._file)

    def __call__(self, index: int, seed: int = 0) -> torch.Tensor:
        height, width, source_height, source_width, *_ = self._file.records[index].item()
        left, top, right, bottom = crop_region(source_width, source_height, int(seed), self._crop_scale)
        down, across = height / source_height, width / source_width
        rows = slice(round(top * down), round(bottom * down))
        columns = slice(round(left * across), round(right * across))
        image = self._file[index].reshape(height, width, 3)[rows, columns]
        crop = resize(image, self._size, self._decoder, self._interpolation)
        return self._augment(crop, seed) if self._augment else crop

    def batch(self, indices: Indices, seeds: Indices) -> torch.Tensor:
        self._file.will_read(indices)
        return torch.stack([self(index, seed) for index, seed in zip(indices, seeds, strict=True)])
