"""Images in tar shards, read at their offsets."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clip_retrieval.data.images.decode import decode_rgb
from clip_retrieval.files import explain_errors, open_regular

WHOLE = slice(None)


class ShardImages:
    """Images by index, read from tar shards.

    Args:
        paths: the shards, named in messages.
        places: int64 (images, 3): shard, first byte and size of each image.
        members: name of each image in its shard.
        files: the file that holds the images of each shard: the shard itself, or a copy.
    """

    def __init__(self, paths: Sequence[object], places: np.ndarray, members: Sequence[str], files: Sequence[Path]):
        self.paths = paths
        self.files = files
        self.places = places
        self.members = members

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Image.Image:
        return decode_rgb(io.BytesIO(self.encoded(index)), self.name(index))

    def encoded(self, index: int, part: slice = WHOLE) -> bytes:
        """Return the bytes of the image file, or a slice of them."""
        shard, begin, size = self.places[index].tolist()
        first, end, _ = part.indices(size)
        # Opening the file each time costs a hundredth of decoding, and leaves processes and threads nothing to share.
        with explain_errors(self.name(index), "start again"), open_regular(self.files[shard]) as file:
            file.seek(begin + first)
            return file.read(end - first)

    def name(self, index: int) -> str:
        return f"{self.paths[self.places[index, 0]]}, {self.members[index]}"

    def key(self, index: int) -> str:
        """Return the name of an image in its shard."""
        return self.members[index]

    def stamp(self, index: int) -> tuple[int, int]:
        """Size of the image in bytes, and time of the shard's last change in ns."""
        shard, _, size = self.places[index].tolist()
        return size, os.stat(self.files[shard]).st_mtime_ns  # noqa: PTH116  a hundred thousand times
