"""A file of uint8 images: read memory-mapped, and written so that what is half-written is never taken for whole.

    image 0 | image 1 | ... | one record for each image | number of images, magic

`X.pixels` is whole: it got its name when all of it was on the disk. Before that, `X.pixels.partial` has the images so
far, and `X.pixels.journal` the records of those that are on the disk for sure.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

RECORD = np.dtype(
    [
        ("height", "<i4"),
        ("width", "<i4"),
        ("source_height", "<i4"),
        ("source_width", "<i4"),
        ("source_bytes", "<i8"),  # these two tell whether the source is still what was read
        ("source_changed", "<i8"),
    ]
)
_END = np.dtype([("images", "<i8"), ("magic", "S8")])
_MAGIC = b"PIXELS01"
FLUSH_BYTES = 64 * 2**20  # what a crash may lose


def read_records(path: Path) -> np.ndarray | None:
    """The records of a whole file; None where there is no file, or it is not whole."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size < _END.itemsize:
                return None
            file.seek(size - _END.itemsize)
            end = np.frombuffer(file.read(), _END)[0]
            table = int(end["images"]) * RECORD.itemsize + _END.itemsize
            if end["magic"] != _MAGIC or not 0 < table <= size:
                return None
            file.seek(size - table)
            records = np.frombuffer(file.read(table - _END.itemsize), RECORD)
    except FileNotFoundError:
        return None
    return records if _offsets(records)[-1] + table == size else None


def _offsets(records: np.ndarray) -> np.ndarray:
    """int64 (images + 1,): image i is the bytes offsets[i] to offsets[i + 1]."""
    sizes = 3 * records["height"].astype(np.int64) * records["width"]
    return np.concatenate([[0], np.cumsum(sizes)])


class PixelFile:
    """A whole file, memory-mapped: what was read once is read at the speed of memory, by all processes together.

    Attributes:
        path: the file.
        records: what is known of each image.
        pixels: uint8 (bytes of all images,); reading brings them from the disk.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records = read_records(path)
        self._offsets = _offsets(self.records)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.pixels = np.frombuffer(self._map, np.uint8, count=self._offsets[-1])

    def __reduce__(self):
        return PixelFile, (self.path,)  # another process maps the file by itself

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> np.ndarray:
        """uint8 (bytes of the image,), not copied and not to be written to."""
        return self.pixels[self._offsets[index] : self._offsets[index + 1]]

    def will_read(self, indices: Sequence[int]) -> None:
        """Have these images read from the disk all at once, not one when the one before it has come."""
        for index in indices:
            begin = self._offsets[index] // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, int(begin), int(self._offsets[index + 1] - begin))


class PartialFile:
    """A file that is being written. Made by `sole_writer`, which goes on where one that was interrupted stopped."""

    def __init__(self, path: Path, file: io.FileIO):
        self.path = path
        self._file = file
        self._journal = _journal(path)
        self._pending, self._pending_bytes = np.empty(0, RECORD), 0
        self.records = self._recover()

    def _recover(self) -> np.ndarray:
        journal = self._journal.read_bytes() if self._journal.exists() else b""
        records = np.frombuffer(journal[: len(journal) // RECORD.itemsize * RECORD.itemsize], RECORD)
        # A crash of the machine may leave the journal with zeros at its end, or the images shorter than it says.
        there = np.cumprod((records["height"] > 0) & (_offsets(records)[1:] <= self._file.seek(0, os.SEEK_END)))
        return records[: int(there.sum())].copy()

    def go_on_after(self, images: int) -> None:
        """Keep the first `images` of those that are there, and nothing else. Comes before the first `append`."""
        self.records = self.records[:images]
        self._file.truncate(int(_offsets(self.records)[-1]))
        with self._journal.open("wb") as journal:
            journal.write(self.records.tobytes())
            journal.flush()
            os.fsync(journal.fileno())

    def append(self, pixels: np.ndarray, records: np.ndarray) -> None:
        """Add images: their bytes one after the other, uint8 (n,), and a record for each."""
        self._write(pixels)
        self._pending = np.concatenate([self._pending, records])
        self._pending_bytes += len(pixels)
        if self._pending_bytes >= FLUSH_BYTES:
            self.flush()

    def _write(self, content: np.ndarray | bytes) -> None:
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]

    def flush(self) -> None:
        """Bring the images to the disk, and then note that they are there."""
        os.fsync(self._file.fileno())
        with self._journal.open("r+b") as journal:
            journal.seek(self.records.nbytes)  # over half a record, where the disk was full before
            journal.write(self._pending.tobytes())
        self.records = np.concatenate([self.records, self._pending])
        self._pending, self._pending_bytes = self.records[:0], 0

    def finish(self) -> None:
        """Give the file its name."""
        self.flush()
        self._write(self.records.tobytes() + np.array((len(self.records), _MAGIC), _END).tobytes())
        os.fsync(self._file.fileno())
        _partial(self.path).replace(self.path)
        self._journal.unlink()
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def discard(self) -> None:
        """Take the unfinished file away."""
        _partial(self.path).unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)


@contextlib.contextmanager
def sole_writer(path: Path, say_waiting: Callable[[], None]) -> Iterator[PartialFile | None]:
    """The unfinished file of `path`, for this process alone; None when somebody else has just finished it.

    A process that writes it already is waited for; one that was killed holds it no longer.

    Args:
        path: the name of the file when it is whole.
        say_waiting: called before a wait.
    """
    with _partial(path).open("ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say_waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            # Who was waited for may have renamed the file, or taken it away: then this is not the unfinished one.
            yield PartialFile(path, file) if _is_at(file, _partial(path)) else None
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # worker processes may still have the file open


def _is_at(file: io.FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}.journal")
