"""Open files without blocking, read text and JSON, and write files atomically."""

from __future__ import annotations

import codecs
import contextlib
import errno
import gzip
import io
import json
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from clip_retrieval.errors import UserError, describe
from clip_retrieval.memory import memory_limit

DEVICES = Path("/dev")


def open_regular(path: str | Path) -> io.BufferedReader:
    """Open a regular file for reading bytes.

    Raises OSError for a folder, and for a FIFO, a socket or a device, which could block for ever or never end. Raises
    OSError, not ValueError, for an invalid file name (with a NUL or half a surrogate pair).
    """
    try:
        # Without O_NONBLOCK, opening a FIFO blocks until it has a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:
        raise OSError(errno.EINVAL, "invalid file name", str(path)) from None
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


def _is_device(path: Path) -> bool:
    mode = path.lstat().st_mode
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


@contextlib.contextmanager
def write_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing; it appears at `path` when it is complete and on the disk.

    The content is written to a temporary file in the same folder, synced, and renamed. If anything fails, the old file
    stays and the temporary file is deleted. A symbolic link at `path` is replaced, not followed. Raises OSError, with
    `filename` set to `path`; also for a device, which root would replace for all programs (/dev/null, /dev/stdout).
    """
    if path.absolute().parent == DEVICES or (os.path.lexists(path) and _is_device(path)):
        raise OSError(errno.EINVAL, "a device, not a file", str(path))
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
    """Open a UTF-8 text file for appending. A symbolic link, FIFO or device at `path` is replaced, not followed.

    Raises OSError.
    """
    remove_special(path)

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o644)

    return open(path, "a", encoding="utf-8", errors="backslashreplace", opener=opener)


def remove_special(path: Path, *, keep_folder: bool = False) -> None:
    """Delete a symbolic link, FIFO, socket or device at `path`. A regular file stays.

    Raises IsADirectoryError for a folder; with `keep_folder`, it stays.
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
    """Set the file name of OSErrors in this block to `path` if they have none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def explain_errors(name: object, remedy: str = "check the path") -> Iterator[None]:
    """Raise UserError(`name`: cannot be read (reason); `remedy`) for an OSError in this block."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({describe(error)}); {remedy}") from None


def write_text(path: Path, text: str) -> None:
    r"""Write a UTF-8 text file atomically. Half a surrogate pair becomes \udXXX, JSON's escape. Raises OSError."""
    with write_atomic(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


def _sync_folder(folder: Path) -> None:
    """Sync a folder to make a rename durable, if the file system supports that."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# Files and folders, in lower case, of macOS, Windows, Synology and QNAP drives, Linux and Python.
CLUTTER = {"__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin"}
CLUTTER |= {"system volume information", "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"}
CLUTTER |= {"lost+found", "__pycache__"}

CHUNK = 2**20  # bytes read at a time

# A gzip file that unpacks to more than BOMB_FROM bytes and BOMB_RATIO times its size is a bomb. Captions reach 5 times.
BOMB_FROM, BOMB_RATIO = 2**28, 200


def read_text(path: Path, errors: str = "strict") -> str:
    """Read a UTF-8 file, with or without a byte order mark. A name ending in .gz means gzip.

    `errors` is that of `bytes.decode`, for bytes that are not UTF-8.

    Raises UserError, naming the file and, if known, the line, if the file is missing, invalid or too large.
    """
    try:
        data = _read_bytes(path)
        text = data.decode("utf-8-sig", errors)
        if "\0" in text:
            line = data.count(b"\n", 0, data.index(0)) + 1
            raise UserError(f"{path}, line {line}: contains a NUL, like UTF-16 and binary files; save it as UTF-8")
        return text
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a complete gzip file ({error}); download it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({describe(error)}); check the path") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise UserError(f"{path}, line {line}: not UTF-8 text (byte 0x{byte:02x}); save it as UTF-8") from None
    except MemoryError:
        raise UserError(f"{path}: larger than the memory of this machine; split it") from None


def _read_bytes(path: Path) -> bytearray:
    """Read a file and decompress it. Raises UserError if it exceeds a quarter of the memory, or is a gzip bomb.

    The content becomes text and then objects, which together take four times its size.
    """
    limit = memory_limit() // 4
    data = bytearray()
    with open_regular(path) as file:
        source = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        while chunk := source.read(CHUNK):
            data += chunk
            if len(data) > limit:
                raise UserError(f"{path}: larger than {limit:,} bytes, a quarter of the memory; split it")
            if source is not file and len(data) > max(BOMB_FROM, BOMB_RATIO * file.tell()):
                raise UserError(
                    f"{path}: {file.tell():,} bytes unpack to {len(data):,}, too many for captions; download it again"
                )
    return data


def read_json(path: Path) -> Any:
    """Read a JSON file (.json or .json.gz). Raises UserError, naming file and line, if it is invalid."""
    try:
        return parse_json(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: broken JSON ({error.msg}); download it again"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: broken JSON ({error}); download it again") from None


def check_root(root: Path) -> None:
    """Raise UserError unless `root` is a folder."""
    if not root.is_dir():
        problem = "not a folder" if root.exists() else "no such folder"
        raise UserError(f"{root}: {problem}; give the folder of the data set as --dataset_root")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError (UnicodeDecodeError, JSONDecodeError, or one with a reason) if it is invalid.

    Half surrogate pairs are kept, because ids and file names may contain them.
    """
    try:
        if isinstance(text, bytes):
            text = text.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogatepass")
        return json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except MemoryError:
        raise ValueError("larger than the memory") from None
    except ValueError:  # int refuses thousands of digits, which would take very long
        raise ValueError("a number has thousands of digits") from None


def to_json(content: Any, indent: int | None = None) -> bytes:
    """Encode JSON as UTF-8, without escapes except for half surrogate pairs, which `parse_json` reads back."""
    return json.dumps(content, ensure_ascii=False, indent=indent).encode(errors="backslashreplace")


def is_clutter(name: str) -> bool:
    """Whether a file or folder was made by the system, a network drive or an editor: `.DS_Store`, `@eaDir`, ..."""
    return name.startswith(".") or name.lower() in CLUTTER


def path_exists(path: str) -> bool:
    """Whether a file or folder exists at `path`. Any text is accepted, also one too long for a path."""
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises OSError for a name that is too long


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON atomically. Raises OSError."""
    with write_atomic(path) as file:
        file.write(to_json(content, indent=2) + b"\n")
