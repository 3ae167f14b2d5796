"""The headers of a tar file, read so that none of them can ask for more than there is.

tarfile believes a header: a sparse member of 10 kB may be 64 GB of zeros, an extended header a gigabyte, and a negative
size an endless loop. Here a member is a part of the file that follows its header, or the file is refused.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from clip_retrieval.errors import UserError

BLOCK = tarfile.BLOCKSIZE
LONGEST_NAME = 4096  # bytes, as of any path
LARGEST_HEADER = 2**20  # bytes of an extended header: a name, and notes of the program that wrote it
LARGEST_PADDING = 2**24  # bytes after the last member
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LONG_NAME, _LONG_LINK, _SPARSE = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.GNUTYPE_SPARSE
_PAX, _PAX_OF_ALL = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE), tarfile.XGLTYPE
_EXTENDED = (_LONG_NAME, _LONG_LINK, *_PAX, _PAX_OF_ALL)


class Header(NamedTuple):
    """A regular file in a tar: its name, its header's and its content's first byte, and the content's size in bytes.

    Bytes of a name that are not UTF-8 are kept as `surrogateescape` does.
    """

    name: str
    header: int
    begin: int
    size: int


class _Broken(Exception):
    """Why a header cannot be used."""


def read_headers(path: Path, file: BinaryIO) -> Iterator[Header]:
    """The regular files of a tar, in order; links, folders and devices are passed over.

    Args:
        path: the tar, for messages.
        file: the tar, opened; its position does not matter, and stays.

    Raises:
        UserError: it is cut short, damaged or sparse, or goes on after its end.
        OSError: it cannot be read.
    """
    total = os.fstat(file.fileno()).st_size
    offset = 0
    try:
        while True:
            # extended headers: a long name or a size for the member that follows
            first, extended = offset, {}
            info = _read_header(file, offset)
            while info is not None and info.type in _EXTENDED:
                content = _read_extended(file, info, offset + BLOCK, total)
                if info.type != _PAX_OF_ALL:
                    extended |= content
                offset += BLOCK + _round_up(info.size)
                info = _read_header(file, offset)
            if info is None:
                break
            # the member itself
            size = extended.get("size", info.size)
            begin = offset + BLOCK
            if info.type == _SPARSE:
                raise _Broken("a sparse member, pack it without --sparse")
            if info.type in tarfile.SUPPORTED_TYPES and info.type not in _REGULAR:
                offset = begin  # links, folders and devices have no content, whatever their sizes
                continue
            if size < 0 or begin + size > total:
                raise _Broken("unexpected end of data")
            offset = begin + _round_up(size)
            if info.type in _REGULAR:
                yield Header(_check_name(extended.get("path", info.name)), first, begin, size)
        _check_end(file, path, offset, total)
    except _Broken as problem:
        raise UserError(f"{path}: cannot be read as a tar (at byte {offset:,}: {problem}); fetch it again") from None


def _read_header(file: BinaryIO, offset: int) -> tarfile.TarInfo | None:
    """The header at this byte; None for the zeros at the end."""
    block = os.pread(file.fileno(), BLOCK, offset)
    if len(block) < BLOCK:
        raise _Broken("unexpected end of data")
    if not block.strip(b"\0"):
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        raise _Broken("a damaged header") from None
    return info


def _read_extended(file: BinaryIO, info: tarfile.TarInfo, begin: int, total: int) -> dict[str, str | int]:
    """The name and the size that an extended header gives the next member."""
    if not 0 <= info.size <= LARGEST_HEADER:
        raise _Broken(f"an extended header of {info.size:,} bytes")
    if begin + info.size > total:
        raise _Broken("unexpected end of data")
    content = os.pread(file.fileno(), info.size, begin)
    if info.type == _LONG_LINK:
        return {}
    if info.type == _LONG_NAME:
        return {"path": content.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    return _parse_pax(content)


def _parse_pax(content: bytes) -> dict[str, str | int]:
    """The path and the size among the records `length keyword=value` of a POSIX header."""
    found: dict[str, str | int] = {}
    at = 0
    while at < len(content) and content[at]:
        digits, _, _ = content[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        keyword, equals, value = content[at + len(digits) + 1 : at + length - 1].partition(b"=")
        if not equals or content[at + length - 1 : at + length] != b"\n":
            raise _Broken("a damaged extended header")
        if keyword.startswith(b"GNU.sparse."):
            raise _Broken("a sparse member, pack it without --sparse")
        if keyword == b"path":
            found["path"] = value.rstrip(b"/").decode("utf-8", "surrogateescape")
        elif keyword == b"size":
            if not value.isdigit() or len(value) > 20:
                raise _Broken("a damaged extended header")
            found["size"] = int(value)
        at += length
    return found


def _check_name(name: str) -> str:
    if len(name) > LONGEST_NAME:
        raise _Broken(f"a name of {len(name):,} characters")
    return name


def _check_end(file: BinaryIO, path: Path, offset: int, total: int) -> None:
    """Raise UserError unless only zeros follow the last member."""
    rest = total - offset
    if rest > LARGEST_PADDING or os.pread(file.fileno(), rest, offset).strip(b"\0"):
        raise UserError(f"{path}: goes on behind its end at byte {offset:,}; is it several tars in one?")


def _round_up(size: int) -> int:
    """The bytes that a content of this size takes."""
    return -(-size // BLOCK) * BLOCK
