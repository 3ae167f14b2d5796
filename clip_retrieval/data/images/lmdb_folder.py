"""Readers of Chinese-CLIP's LMDB folders: `imgs` (id -> base64) and `pairs` (number -> pickled ids and text).

They use neither liblmdb nor an unpickler that builds objects: see `lmdb_reader` and `pair_pickle`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from clip_retrieval.data.images.base64_images import Base64Images
from clip_retrieval.data.images.decode import LARGEST_FILE
from clip_retrieval.data.images.lmdb_reader import LmdbReader
from clip_retrieval.data.images.pair_pickle import read_pair
from clip_retrieval.errors import UserError

NUM_IMAGES = b"num_images"
NUM_SAMPLES = b"num_samples"
# Prefix of our own keys in `pairs`, which Chinese-CLIP ignores: the lines of texts without an image.
TEXT_WITHOUT_IMAGE = b"text:"
LARGEST_PAIR = 2**20  # bytes
_Value = TypeVar("_Value")


def read_count(reader: LmdbReader, key: bytes) -> int:
    """Read the number of images or pairs, which is written last. Raises UserError if it is missing."""
    value = reader.get(key)
    if value is None or not value.isdigit() or len(value) > 18:
        raise UserError(
            f"{reader.path.parent}: not a complete LMDB of Chinese-CLIP (no {key.decode()}); build it again"
        )
    return int(value)


class LmdbImages(Base64Images):
    """The images of an `imgs` folder, in the order of their keys."""

    def __init__(self, folder: Path):
        self._reader = LmdbReader(folder, LARGEST_FILE)
        read_count(self._reader, NUM_IMAGES)
        keys = [key for key in self._reader.iter_keys() if key != NUM_IMAGES]
        try:
            super().__init__(folder, [key.decode() for key in keys])
        except UnicodeDecodeError as error:
            raise UserError(f"{folder}: the image id {error.object[:40]!r} is not UTF-8 text; build it again") from None
        if not keys:
            raise UserError(f"{folder}: holds no images")

    def base64(self, index: int) -> bytes:
        return self._require(self._reader.get(self.keys[index].encode()), index)

    def _require(self, value: _Value | None, index: int) -> _Value:
        if value is None:
            raise UserError(f"{self.name(index)}: deleted during the run; start again")
        return value

    def name(self, index: int) -> str:
        return f"{self.path}, key {self.keys[index]}"

    def stamp(self, index: int) -> tuple[int, int]:
        size = self._require(self._reader.size(self.keys[index].encode()), index)
        return size, self._reader.path.stat().st_mtime_ns


def read_pairs(folder: Path) -> Iterator[tuple[int, tuple[int | str, int | str, str]]]:
    """Yield (key, (image id, text id, text)) of each pair of a `pairs` folder, in order.

    Raises UserError, naming the folder and the key, if a pair is missing or invalid.
    """
    reader = LmdbReader(folder, LARGEST_PAIR)
    number_of_pairs = read_count(reader, NUM_SAMPLES)
    pickled = dict(reader.items())  # an order of magnitude faster than single look-ups
    for number in range(number_of_pairs):
        try:
            yield number, read_pair(pickled.pop(b"%d" % number))
        except KeyError:
            raise UserError(f"{folder}, key {number}: missing; build it again") from None
        except ValueError as error:
            raise UserError(
                f"{folder}, key {number}: refused ({error}); a pair holds an image id, a text id and a text only"
            ) from None


def read_texts_without_image(folder: Path) -> list[dict]:
    """Read the texts without an image from a `pairs` folder that we wrote, as records of the jsonl."""
    texts: list[dict] = []
    for key, line in LmdbReader(folder, LARGEST_PAIR).items(TEXT_WITHOUT_IMAGE):
        if not key.startswith(TEXT_WITHOUT_IMAGE):
            break
        try:
            text = json.loads(line)
        except (ValueError, RecursionError):
            text = None
        if not isinstance(text, dict):
            raise UserError(f"{folder}, key {key.decode(errors='replace')}: broken JSON; build it again")
        texts.append(text)
    return texts
