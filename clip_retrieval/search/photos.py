"""Load the photographs to encode in worker processes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clip_retrieval.data.images.decode import decode_rgb, read_encoded
from clip_retrieval.data.images.photographs import prepare_photo
from clip_retrieval.data.pixels.pixels import ImageTransform
from clip_retrieval.data.workers import default_num_workers, map_in_workers
from clip_retrieval.errors import UserError
from clip_retrieval.search.encoder import Encoder
from clip_retrieval.search.files import Stamp, digest
from clip_retrieval.search.index import Entry


class Batch(NamedTuple):
    """Some files: uint8 (readable, 3, height, width) of the readable ones, and the entries of all, without times."""

    pixels: Tensor
    entries: list[Entry]


class _Fetch:
    def __init__(self, photos: Path, sizes: dict[str, int], preprocess: dict):
        self.photos = photos
        self.sizes = sizes
        self._transform = ImageTransform(preprocess)

    def __call__(self, names: list[str]) -> Batch:
        read = [self._read(name) for name in names]
        pixels = [image for image, _ in read if image is not None]
        return Batch(torch.stack(pixels) if pixels else torch.empty(0), [entry for _, entry in read])

    def _read(self, name: str) -> tuple[Tensor | None, Entry]:
        path, known = str(self.photos / name), None
        try:
            content = read_encoded(path)
            known = digest(content)
            image = decode_rgb(io.BytesIO(content), name, prepare_photo)
        except UserError as error:
            return None, Entry(name, self.sizes[name], None, known, problem=str(error))
        return self._transform(image), Entry(name, self.sizes[name], None, known, image.width, image.height)


def load_photos(photos: Path, stamps: dict[str, Stamp], encoder: Encoder) -> Iterator[Batch]:
    """Yield the files in order, in batches. Files that cannot be read have a problem instead of pixels."""
    names = list(stamps)
    requests = [names[start : start + encoder.batch_size] for start in range(0, len(names), encoder.batch_size)]
    return map_in_workers(
        _Fetch(photos, {name: size for name, (size, _) in stamps.items()}, encoder.preprocess),
        requests,
        num_workers=default_num_workers(encoder.device) if encoder.num_workers is None else encoder.num_workers,
        pin_memory=encoder.device.type == "cuda",
    )
