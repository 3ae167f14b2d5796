"""A file of uint8 images, written so that an incomplete file is never read as a complete one.

    image 0 | image 1 | ... | one record for each image | number of images, magic

`X.pixels` is complete: it gets this name after all of it is on the disk. Until then, `X.pixels.partial` has the images
so far, and `X.pixels.journal` the records of the images that are certainly on the disk. Reads use `pread`, which
the page cache serves: if the file is truncated meanwhile, `pread` gives an error, but a memory map kills the process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator
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
        ("source_bytes", "<i8"),  # this and the next detect a changed source
        ("source_changed", "<i8"),
    ]
)
_END = np.dtype([("images", "<i8"), ("magic", "S8")])
_MAGIC = b"PIXELS01"
FLUSH_BYTES = 64 * 2**20  # the most that a crash may lose


def read_records(path: Path, images: int) -> np.ndarray | None:
    """Read the records of a complete file of this many images; None if the file is missing, different or incomplete."""
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
    return records if _fits(records, begin).all() and _offsets(records)[-1] == begin else None


def _fits(records: np.ndarray, size: int) -> np.ndarray:
    """bool (images,): whether an image and all images before it fit in `size` bytes."""
    sides = np.stack([records[name] for name in ("height", "width", "source_height", "source_width")])
    sizes = 3.0 * sides[0] * sides[1]  # as floats: a damaged record may overflow int64
    return np.logical_and.accumulate((sides > 0).all(0) & (np.cumsum(sizes) <= size))


def _offsets(records: np.ndarray) -> np.ndarray:
    """int64 (images + 1,): image i has the bytes offsets[i] to offsets[i + 1]."""
    sizes = 3 * records["height"].astype(np.int64) * records["width"]
    return np.concatenate([[0], np.cumsum(sizes)])


class PixelFile:
    """A complete file. All processes share the page cache, so later reads run at the speed of memory.

    Attributes:
        path: the file.
        records: RECORD (images,), the size and the source of each image.

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
        return PixelFile, (self.path, len(self.records))  # each process opens the file itself

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> np.ndarray:
        """uint8 (bytes of the image,)."""
        pixels = np.empty(self._offsets[index + 1] - self._offsets[index], np.uint8)
        self.read_into(pixels, index)
        return pixels

    def read_into(self, pixels: np.ndarray, index: int) -> None:
        """Read an image into a contiguous uint8 array of its size."""
        rest, begin = pixels.data.cast("B"), int(self._offsets[index])
        try:
            while rest:
                count = os.preadv(self._file.fileno(), [rest], begin)
                if not count:
                    raise self._make_error("it has become shorter")
                rest, begin = rest[count:], begin + count
        except OSError as error:
            raise self._make_error(error.strerror) from None

    def will_read(self, indices: Iterable[int]) -> None:
        """Ask the system to read these images from the disk in parallel, before they are needed."""
        if not hasattr(os, "posix_fadvise"):
            return
        for index in indices:
            begin, end = self._offsets[index : index + 2].tolist()
            os.posix_fadvise(self._file.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)

    def _make_error(self, reason: str | None) -> UserError:
        return UserError(f"{self.path}: cannot be read ({reason}); restart the run to rebuild it")


class PartialFile:
    """An incomplete file, opened by `open_partial`; it resumes an interrupted one."""

    def __init__(self, path: Path, file: io.FileIO, images: int):
        self.path = path
        self._file = file
        self._journal = path.with_name(f"{path.name}.journal")
        self._pending, self._pending_bytes = np.empty(0, RECORD), 0
        self.records = self._recover(images)

    def _recover(self, images: int) -> np.ndarray:
        """Read the records of the images that are certainly on the disk, at most `images`."""
        try:
            with open_regular(self._journal) as file:
                journal = file.read(images * RECORD.itemsize)
        except OSError:
            journal = b""
        records = np.frombuffer(journal[: len(journal) // RECORD.itemsize * RECORD.itemsize], RECORD)
        # A crash of the machine may leave zeros at the end of the journal, or fewer images than it has records.
        is_stored = _fits(records, self._file.seek(0, os.SEEK_END))
        return records[: int(is_stored.sum())].copy()

    def keep_first(self, images: int) -> None:
        """Truncate to the first `images` images. Must be called before the first `append`."""
        self.records = self.records[:images]
        self._file.truncate(int(_offsets(self.records)[-1]))
        self._journal.unlink(missing_ok=True)  # it may be a link
        with self._journal.open("xb") as journal:
            journal.write(self.records.tobytes())
            journal.flush()
            os.fsync(journal.fileno())

    def append(self, pixels: np.ndarray, records: np.ndarray) -> None:
        """Add images: their concatenated bytes, uint8 (n,), and a record for each."""
        self._write(pixels.data)
        self._pending = np.concatenate([self._pending, records])
        self._pending_bytes += len(pixels)
        if self._pending_bytes >= FLUSH_BYTES:
            self.flush()

    def _write(self, content: memoryview | bytes) -> None:
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]

    def flush(self) -> None:
        """Write the images to the disk, then their records to the journal."""
        os.fsync(self._file.fileno())
        with self._journal.open("r+b") as journal:
            journal.seek(self.records.nbytes)  # overwrites half a record of a full disk
            journal.write(self._pending.tobytes())
        self.records = np.concatenate([self.records, self._pending])
        self._pending, self._pending_bytes = self.records[:0], 0

    def finish(self) -> None:
        """Write the records and the end, and rename the file to its final name."""
        self.flush()
        self._write(self.records.tobytes() + np.array((len(self.records), _MAGIC), _END).tobytes())
        os.fsync(self._file.fileno())
        _partial_path(self.path).replace(self.path)
        self._journal.unlink()
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def discard(self) -> None:
        """Delete the incomplete file."""
        _partial_path(self.path).unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)


@contextlib.contextmanager
def open_partial(path: Path, images: int, on_wait: Callable[[], None]) -> Iterator[PartialFile | None]:
    """Open the incomplete file of `path` with an exclusive lock; None if another process has just finished it.

    Waits while another process writes it. A killed process loses its lock.

    Args:
        path: the name of the complete file.
        images: number of images in the complete file.
        on_wait: called before a wait.

    Raises:
        OSError: the file cannot be opened or locked, or is not a regular file; links are not followed.
    """
    with _open_to_append(_partial_path(path)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            # The previous owner of the lock may have renamed or deleted the file; then this is not the partial file.
            yield PartialFile(path, file, images) if _is_same_file(file, _partial_path(path)) else None
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # worker processes may still have the file open


def _open_to_append(path: Path) -> io.FileIO:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "ab", buffering=0)


def _is_same_file(file: io.FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _partial_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")
