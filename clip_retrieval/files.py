"""Files opened so that they cannot hang a run, and written so that a crash never leaves half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading bytes.

    A FIFO, a socket or a device would block for ever or never end; all of them raise OSError here, as a folder does.
    A name that no file can have (a NUL, half a surrogate pair) raises OSError too, instead of ValueError.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO waits for its writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except ValueError:
        raise OSError(errno.EINVAL, "no file can have this name", str(path)) from None
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


@contextlib.contextmanager
def write_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only when all of it is on the disk.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and the file is renamed. If anything
    fails, the file that was there before stays and the temporary one is removed. A symbolic link under this name is
    replaced, not followed. Raises OSError, with `filename` set to `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


def open_append(path: Path) -> TextIO:
    """Open a UTF-8 text file for appending; a symbolic link, FIFO or device under this name is replaced, not followed.

    Raises OSError.
    """
    remove_special(path)

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o644)

    return open(path, "a", encoding="utf-8", errors="backslashreplace", opener=opener)


def remove_special(path: Path, *, keep_folder: bool = False) -> None:
    """Delete a symbolic link, FIFO, socket or device under this name, so that writing there cannot reach elsewhere.

    A regular file stays, and a folder does too with `keep_folder`; without it, a folder raises IsADirectoryError.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode) and not keep_folder:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
    """A block whose OSErrors without a file name are about `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    r"""Write a UTF-8 text file atomically; half a surrogate pair becomes \udXXX, as JSON escapes it. Raises OSError."""
    with write_atomic(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, on the file systems that can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
