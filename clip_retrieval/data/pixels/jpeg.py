"""JPEG files that the device decodes and resizes (`--decoder gpu`): loader processes only read their bytes.

On a GPU nvJPEG decodes baseline JPEG files in batches. Other files (PNG, progressive or CMYK JPEG, broken files) are
read as with decoder "fast", so that a batch may hold both. Crops are those of the other decoders; only pixels differ.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip_retrieval.data.dataset import EncodedImages
from clip_retrieval.data.images.decode import baseline_jpeg_size, decode_rgb
from clip_retrieval.data.pixels.augment import CROP_SCALE, crop_region
from clip_retrieval.data.pixels.transforms import (
    evaluation_transform,
    interpolation_mode,
    model_size,
    resize,
    resize_decoded,
)
from clip_retrieval.errors import UserError
from clip_retrieval.log import log

PIXELS_AT_A_TIME = 2**24  # of decoded images, 18 bytes each on the device: 300 MB
PARTS_AHEAD = 4  # parts of batches that are decoded before they are needed: a batch of 256

DEVICES = ("cuda",)  # types of devices that decode

Region = tuple[int, int, int, int]


def check_decoder(decoder: str, device: torch.device) -> None:
    """Raise UserError if the device of the model cannot decode, but is to."""
    if decoder == "gpu" and device.type not in DEVICES:
        raise UserError(f"--decoder gpu needs a CUDA device, not {device.type}; use --decoder fast")


class JpegTransform:
    """Reads image files for the device; the counterpart of `ImageTransform`.

    Args:
        preprocess: open_clip's preprocessing, as a dict.
        augment: "none" or "crop".
        crop_scale: the smallest share of the image's area in a crop.
    """

    def __init__(self, preprocess: dict, *, augment: str = "none", crop_scale: float = CROP_SCALE):
        self.size = model_size(preprocess)
        self.interpolation = interpolation_mode(preprocess)
        self.crop_scale = crop_scale if augment == "crop" else None
        self._on_device = evaluation_transform(preprocess, "gpu")
        self._on_cpu = evaluation_transform(preprocess, "fast")

    def read(self, content: bytes, name: str, seed: int = 0) -> JpegFile | Tensor:
        """Return the file, or uint8 (3, height, width) if the device cannot decode it.

        Raises UserError, naming the image, if it cannot be read.
        """
        size = baseline_jpeg_size(content)
        if size is None or max(size) > min(self.size) * min(size):  # extremely long ones are cropped before resizing
            return self.decode_on_cpu(content, name, seed)
        return JpegFile(content, name, seed, size, self)

    def decode_on_cpu(self, content: bytes, name: str, seed: int) -> Tensor:
        """uint8 (3, height, width), as with decoder "fast"."""
        image = decode_rgb(io.BytesIO(content), name)
        if self.crop_scale is None:
            return self._on_cpu(image)
        return resize(image.crop(self.region(image.size, seed)), self.size, "fast", self.interpolation)

    def region(self, size: tuple[int, int], seed: int) -> Region:
        """(left, top, right, bottom) of the part that the model sees of an image of `size`, (width, height)."""
        return (0, 0, *size) if self.crop_scale is None else crop_region(*size, seed, self.crop_scale)

    def resize(self, images: Tensor, region: Region) -> Tensor:
        """Resize a region of decoded images, uint8 (n, 3, height, width)."""
        if self.crop_scale is None:
            return self._on_device(images)
        left, top, right, bottom = region
        return resize_decoded(images[..., top:bottom, left:right], self.size, self.interpolation)


class JpegFile(NamedTuple):
    """An image that the device decodes: its bytes, name, seed, (width, height) and transform."""

    content: bytes
    name: str
    seed: int
    size: tuple[int, int]
    transform: JpegTransform


class JpegBatch(NamedTuple):
    """Images of a batch, at least one of them a JPEG file, in tensors that processes can share.

    Attributes:
        content: uint8 (bytes,), the files one after the other.
        lengths: the bytes of each file.
        files: the files by row of the batch, without their content.
        pixels: uint8 (m, 3, height, width), the images of the other rows.
    """

    content: Tensor
    lengths: list[int]
    files: dict[int, JpegFile]
    pixels: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Tensor:
        """Decode on the device: uint8 (n, 3, height, width). Raises UserError for an unreadable image."""
        pixels, _, problems = self.decode(device)
        if problems:
            raise UserError(problems[0])
        return pixels

    def decode(self, device: torch.device) -> tuple[Tensor, list[int], list[str]]:
        """Decode on the device; replace an unreadable image by the next readable one.

        Returns:
            uint8 (n, 3, height, width), the n rows whose images these are, and the problems of the unreadable ones.

        Raises:
            UserError: no image is readable.
        """
        stream = _decoding_stream(device)
        with torch.cuda.stream(stream) if stream else nullcontext():
            # decode the files, a few at a time
            found: dict[int, Tensor] = {}
            problems: list[str] = []
            content = dict(zip(self.files, self.content.split(self.lengths)))
            for rows in self._split_rows():
                self._decode_rows({row: content[row] for row in rows}, device, found, problems)
            number = len(self.files) + len(self.pixels)
            others = [row for row in range(number) if row not in self.files]
            found.update(zip(others, self.pixels.to(device)))

            # replace the unreadable ones
            if not found:
                raise UserError(f"{problems[0]}; no other image of its part of the batch can be read either")
            readable = sorted(found)
            rows = [next((row for row in readable if row >= own), readable[0]) for own in range(number)]
            pixels = torch.stack([found[row] for row in rows])
        if stream:
            stream.synchronize()  # any stream may read the pixels
            pixels.record_stream(torch.cuda.current_stream(device))
        return pixels, rows, problems

    def _split_rows(self) -> Iterator[list[int]]:
        """Yield the rows with files, so many at a time that their decoded pixels fit into memory."""
        rows: list[int] = []
        total = 0
        for row, file in self.files.items():
            pixels = file.size[0] * file.size[1]
            if rows and total + pixels > PIXELS_AT_A_TIME:
                yield rows
                rows, total = [], 0
            rows.append(row)
            total += pixels
        yield rows

    def _decode_rows(
        self, content: dict[int, Tensor], device: torch.device, found: dict[int, Tensor], problems: list[str]
    ) -> None:
        """Decode and resize the images of some rows; add their pixels to `found`, or the fault to `problems`."""
        # decode, and group the images of one size and region
        groups: dict[tuple[tuple[int, int], Region], dict[int, Tensor]] = {}
        for row, pixels in zip(content, decode_files(list(content.values()), device)):
            _, name, seed, size, transform = self.files[row]
            if pixels is not None and pixels.shape[1:] == size[::-1]:
                groups.setdefault((size, transform.region(size, seed)), {})[row] = pixels
                continue
            try:
                found[row] = transform.decode_on_cpu(content[row].numpy().tobytes(), name, seed).to(device)
            except UserError as error:
                problems.append(str(error))
        # resize each group at once
        for (_, region), members in groups.items():
            transform = self.files[next(iter(members))].transform
            found.update(zip(members, transform.resize(torch.stack(list(members.values())), region)))


class JpegPixels:
    """The pixels of encoded images that the device decodes (see `data.pixels.Pixels`)."""

    in_memory = False

    def __init__(self, images: EncodedImages, transform: JpegTransform):
        self.images = images
        self._transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __call__(self, index: int, seed: int = 0) -> JpegFile | Tensor:
        return self._transform.read(self.images.encoded(index), self.images.name(index), seed)

    def batch(self, indices: Any, seeds: Any) -> JpegBatch | Tensor:
        return collate([self(int(index), int(seed)) for index, seed in zip(indices, seeds, strict=True)])


def collate(images: Sequence[JpegFile | Tensor]) -> JpegBatch | Tensor:
    """Make a batch: uint8 (n, 3, height, width) if no image is a JPEG file."""
    pixels = [image for image in images if isinstance(image, Tensor)]
    if len(pixels) == len(images):
        return torch.stack(pixels)
    files = {row: image for row, image in enumerate(images) if isinstance(image, JpegFile)}
    return JpegBatch(
        torch.frombuffer(bytearray(b"".join(file.content for file in files.values())), dtype=torch.uint8),
        [len(file.content) for file in files.values()],
        {row: file._replace(content=b"") for row, file in files.items()},
        torch.stack(pixels) if pixels else torch.empty(0, dtype=torch.uint8),
    )


def decode_files(files: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """Decode JPEG files, uint8 (bytes,): uint8 (3, height, width) each, None if the device cannot."""
    from torchvision.io import ImageReadMode, decode_jpeg

    if device.type == "cuda":
        # torchvision decodes on a stream of its own into memory of this one, whose earlier work may still read it
        torch.cuda.current_stream(device).synchronize()
    try:
        return decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # it does not tell for which file
        if len(files) > 1:
            return [image for file in files for image in decode_files([file], device)]
        _warn_of_failure(str(error).strip().partition("\n")[0])
        return [None]


@cache  # once for each message
def _warn_of_failure(message: str) -> None:
    log.warning(f"--decoder gpu: there are images that only the CPU decodes ({message})")


@cache
def _decoding_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def decode_ahead(parts: Iterable[Any], decode: Callable[[Any], Any], device: torch.device) -> Iterator[Any]:
    """Yield decode(part) for each part, computed ahead in a thread, so that the training step need not wait."""

    def decode_there(part: Any) -> Any:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return decode(part)

    pending: list[Future] = []
    with ThreadPoolExecutor(1) as thread:
        for part in parts:
            pending.append(thread.submit(decode_there, part))
            if len(pending) > PARTS_AHEAD:
                yield pending.pop(0).result()
        while pending:
            yield pending.pop(0).result()
