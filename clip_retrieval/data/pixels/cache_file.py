"""A file of uint8 images, written so that what is half-written is never taken for whole.

    image 0 | image 1 | ... | one record for each image | number of images, magic

`X.pixels` is whole: it got its name when all of it was on the disk. Before that, `X.pixels.partial` has the images so
far, and `X.pixels.journal` the records of those that are on the disk for sure. It is read with `pread`, which the
system serves from memory: a file that becomes shorter meanwhile is an error, and not the end of the process, as it is
for one that is mapped.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from clip_retrieval.errors import UserError
from clip_retrieval.files import open_regular

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


def read_records(path: Path, images: int) -> np.ndarray | None:
    """The records of a whole file of so many images; None if there is no file, or another one, or it is not whole."""
    try:
        with open_regular(path) as file:
            return _read_table(file, images)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL):  # EINVAL: no regular file
            return None
        raise


def _read_table(file: BinaryIO, images: int) -> np.ndarray | None:
    table = images * RECORD.itemsize + _END.itemsize
    begin = file.seek(0, os.SEEK_END) - table
    if begin < 0:
        return None
    file.seek(begin)
    content = file.read(table)
    end = np.frombuffer(content[-_END.itemsize :], _END)
    if len(content) != table or end.tolist() != [(images, _MAGIC)]:
        return None
    records = np.frombuffer(content[: -_END.itemsize], RECORD)
    return records if _fit(records, begin).all() and _offsets(records)[-1] == begin else None


def _fit(records: np.ndarray, size: int) -> np.ndarray:
    """bool (images,): whether an image, and all before it, can be in so many bytes."""
    sides = np.stack([records[name] for name in ("height", "width", "source_height", "source_width")])
    sizes = 3.0 * sides[0] * sides[1]  # as floats: those of a damaged record may be too large for int64
    return np.logical_and.accumulate((sides > 0).all(0) & (np.cumsum(sizes) <= size))


def _offsets(records: np.ndarray) -> np.ndarray:
    """int64 (images + 1,): image i is the bytes offsets[i] to offsets[i + 1]."""
    sizes = 3 * records["height"].astype(np.int64) * records["width"]
    return np.concatenate([[0], np.cumsum(sizes)])


class PixelFile:
    """A whole file: what was read once is read at the speed of memory, by all processes together.

    Attributes:
        path: the file.
        records: what is known of each image.

    Raises:
        UserError: here and in all methods, if the file has changed or cannot be read.
    """

    def __init__(self, path: Path, images: int):
        self.path = path
        try:
            self._file = open_regular(path)
            records = _read_table(self._file, images)
        except OSError as error:
            raise self._make_error(error.strerror) from None
        if records is None:
            raise self._make_error("it has changed")
        self.records = records
        self._offsets = _offsets(records)

    def __reduce__(self):
        return PixelFile, (self.path, len(self.records))  # another process opens the file by itself

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> np.ndarray:
        """uint8 (bytes of the image,)."""
        pixels = np.empty(self._offsets[index + 1] - self._offsets[index], np.uint8)
        self.read_into(pixels, index)
        return pixels

    def read_into(self, pixels: np.ndarray, index: int) -> None:
        """Read an image to a contiguous uint8 array of its size."""
        rest, begin = memoryview(pixels).cast("B"), int(self._offsets[index])
        try:
            while rest:
                count = os.preadv(self._file.fileno(), [rest], begin)
                if not count:
                    raise self._make_error("it has become shorter")
                rest, begin = rest[count:], begin + count
        except OSError as error:
            raise self._make_error(error.strerror) from None

    def will_read(self, indices: Sequence[int]) -> None:
        """Have these images read from the disk all at once, not one when the one before it has come."""
        if not hasattr(os, "posix_fadvise"):
            return
        for index in indices:
            begin, end = self._offsets[index : index + 2].tolist()
            os.posix_fadvise(self._file.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)

    def _make_error(self, reason: str | None) -> UserError:
        return UserError(f"{self.path}: cannot be read ({reason}); start again, and it is built anew")


class PartialFile:
    """A file that is being written. Made by `sole_writer`, which goes on where one that was interrupted stopped."""

    def __init__(self, path: Path, file: io.FileIO, images: int):
        self.path = path
        self._file = file
        self._journal = _journal(path)
        self._pending, self._pending_bytes = np.empty(0, RECORD), 0
        self.records = self._recover(images)

    def _recover(self, images: int) -> np.ndarray:
        """The records of at most so many images that are there."""
        try:
            with open_regular(self._journal) as file:
                journal = file.read(images * RECORD.itemsize)
        except OSError:
            journal = b""
        records = np.frombuffer(journal[: len(journal) // RECORD.itemsize * RECORD.itemsize], RECORD)
        # A crash of the machine may leave the journal with zeros at its end, or the images shorter than it says.
        there = _fit(records, self._file.seek(0, os.SEEK_END))
        return records[: int(there.sum())].copy()

    def go_on_after(self, images: int) -> None:
        """Keep the first `images` of those that are there, and nothing else. Comes before the first `append`."""
        self.records = self.records[:images]
        self._file.truncate(int(_offsets(self.records)[-1]))
        self._journal.unlink(missing_ok=True)  # it may be a link
        with self._journal.open("xb") as journal:
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
def sole_writer(path: Path, images: int, say_waiting: Callable[[], None]) -> Iterator[PartialFile | None]:
    """The unfinished file of `path`, for this process alone; None when somebody else has just finished it.

    A process that writes it already is waited for; one that was killed holds it no longer.

    Args:
        path: the name of the file when it is whole.
        images: their number then.
        say_waiting: called before a wait.

    Raises:
        OSError: the file cannot be opened or locked, or is no regular file: a link is not followed.
    """
    with _open_to_append(_partial(path)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say_waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            # Who was waited for may have renamed the file, or taken it away: then this is not the unfinished one.
            yield PartialFile(path, file, images) if _is_at(file, _partial(path)) else None
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # worker processes may still have the file open


def _open_to_append(path: Path) -> io.FileIO:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "ab", buffering=0)


def _is_at(file: io.FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}.journal")
