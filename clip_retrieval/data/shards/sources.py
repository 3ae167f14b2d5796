"""Open shards: local ones at any byte, compressed and remote ones from front to back."""

from __future__ import annotations

import contextlib
import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from clip_retrieval.data.shards.remote import RemoteFile, Url
from clip_retrieval.errors import UserError, describe
from clip_retrieval.files import BOMB_FROM, BOMB_RATIO, CHUNK, open_regular

GZIP_MAGIC = b"\x1f\x8b"

Place = Path | Url
"""Where a shard is."""


class SeekableSource:
    """A local file, of `size` bytes."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.size = os.fstat(file.fileno()).st_size

    def read_at(self, offset: int, number: int) -> bytes:
        """Read `number` bytes from a byte on, fewer at the end."""
        if number <= CHUNK:
            return os.pread(self.file.fileno(), number, offset)
        self.file.seek(offset)
        return self.file.read(number)


class ForwardSource:
    """A stream of unknown size, read at growing positions; the bytes between them are read and dropped."""

    size = None

    def __init__(self, stream: BinaryIO | gzip.GzipFile | RemoteFile):
        self.stream = stream
        self.position = 0

    def read_at(self, offset: int, number: int) -> bytes:
        """Read as `SeekableSource.read_at`."""
        assert offset >= self.position
        while self.position < offset and self._read(min(CHUNK, offset - self.position)):
            pass
        parts: list[bytes] = []
        while self.position < offset + number:
            if not (part := self._read(min(CHUNK, offset + number - self.position))):
                break
            parts.append(part)
        return b"".join(parts)

    def _read(self, number: int) -> bytes:
        part = self.stream.read(number)
        self.position += len(part)
        return part


class _Gzip(ForwardSource):
    """A gzip stream. Raises UserError if it is a bomb."""

    def __init__(self, place: Place, raw: BinaryIO | RemoteFile):
        super().__init__(gzip.GzipFile(fileobj=raw))  # type: ignore[arg-type]  # it calls `read` only
        self.place = place
        self.raw = raw

    def _read(self, number: int) -> bytes:
        part = super()._read(number)
        if self.position > max(BOMB_FROM, BOMB_RATIO * self.raw.tell()):
            raise UserError(
                f"{self.place}: {self.raw.tell():,} bytes unpack to {self.position:,}, too many for images; remove it"
            )
        return part


Source = SeekableSource | ForwardSource


@contextlib.contextmanager
def open_shard(place: Place) -> Iterator[Source]:
    """Open a shard, also a compressed one, for a block.

    Raises UserError instead of an OSError of the block, and RunError if a server fails.
    """
    try:
        if isinstance(place, Url):
            with contextlib.closing(RemoteFile(place)) as stream:
                yield _Gzip(place, stream) if stream.peek(len(GZIP_MAGIC)) == GZIP_MAGIC else ForwardSource(stream)
            return
        with open_regular(place) as file:
            is_gzip = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
            file.seek(0)
            yield _Gzip(place, file) if is_gzip else SeekableSource(file)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{place}: cannot be read as a tar ({describe(error)}); fetch it again") from None


def is_forward(place: Place) -> bool:
    """Whether a shard is remote or compressed: its samples are counted by reading all of it."""
    if isinstance(place, Url):
        return True
    try:
        with open_regular(place) as file:
            return file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    except OSError:
        return False
