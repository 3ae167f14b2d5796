"""Read the headers of an untrusted tar file, limited to the bytes that the file has.

tarfile trusts headers: a sparse member of 10 kB may expand to 64 GB of zeros, an extended header to a gigabyte, and a
negative size causes an endless loop. Here, a file is refused unless each member's content follows its header in full.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import NamedTuple, TypedDict

from clip_retrieval.data.shards.sources import Place, Source
from clip_retrieval.errors import UserError

BLOCK = tarfile.BLOCKSIZE
MAX_NAME_LENGTH = 4096  # characters; Linux's limit for paths
MAX_HEADER_BYTES = 2**20  # bytes of an extended header: a name, and metadata of the program that wrote it
MAX_PADDING_BYTES = 2**24  # bytes after the last member
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LONG_NAME, _LONG_LINK, _SPARSE = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.GNUTYPE_SPARSE
_PAX, _PAX_GLOBAL = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE), tarfile.XGLTYPE
_EXTENDED = (_LONG_NAME, _LONG_LINK, *_PAX, _PAX_GLOBAL)


class Header(NamedTuple):
    """A regular file in a tar: its name, and the first byte and the size in bytes of its content.

    Bytes of the name that are not UTF-8 are decoded with `surrogateescape`.
    """

    name: str
    begin: int
    size: int


class _Extended(TypedDict, total=False):
    """The name and the size that an extended header gives to the next member."""

    path: str
    size: int


class _DamagedError(Exception):
    """The reason why a header is refused."""


def read_headers(path: Place, file: Source) -> Iterator[Header]:
    """Read the headers of a tar's regular files, in order; skip links, folders and devices.

    Args:
        path: the tar, for messages.
        file: the open tar. Read the content of a file that comes from front to back before the next header.

    Raises:
        UserError: the tar is truncated, damaged or sparse, or data follow its end.
        OSError: the tar cannot be read.
    """
    total = file.size
    offset = 0
    try:
        while True:
            # extended headers: a long name or a size for the member that follows
            extended: _Extended = {}
            info = _read_header(file, offset)
            while info is not None and info.type in _EXTENDED:
                content = _read_extended(file, info, offset + BLOCK)
                if info.type != _PAX_GLOBAL:
                    extended |= content
                offset += BLOCK + _round_up(info.size)
                info = _read_header(file, offset)
            if info is None:
                break
            # the member itself
            size = extended.get("size", info.size)
            begin = offset + BLOCK
            if info.type == _SPARSE:
                raise _DamagedError("a sparse member, pack it without --sparse")
            if info.type in tarfile.SUPPORTED_TYPES and info.type not in _REGULAR:
                offset = begin  # links, folders and devices have no content, even if their size is not 0
                continue
            if size < 0 or (total is not None and begin + size > total):
                raise _DamagedError("unexpected end of data")
            offset = begin + _round_up(size)
            if info.type in _REGULAR:
                yield Header(_check_name(extended.get("path", info.name)), begin, size)
        _check_end(file, path, offset)
    except _DamagedError as problem:
        raise UserError(f"{path}: cannot be read as a tar (at byte {offset:,}: {problem}); fetch it again") from None


def _read_header(file: Source, offset: int) -> tarfile.TarInfo | None:
    """Read the header at a byte; None for the zeros at the end."""
    block = file.read_at(offset, BLOCK)
    if len(block) < BLOCK:
        raise _DamagedError("unexpected end of data")
    if not block.strip(b"\0"):
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        raise _DamagedError("a damaged header") from None
    return info


def _read_extended(file: Source, info: tarfile.TarInfo, begin: int) -> _Extended:
    """Read the name and the size of the next member from an extended header, if it has them."""
    if not 0 <= info.size <= MAX_HEADER_BYTES:
        raise _DamagedError(f"an extended header of {info.size:,} bytes")
    content = file.read_at(begin, info.size)
    if len(content) != info.size:
        raise _DamagedError("unexpected end of data")
    if info.type == _LONG_LINK:
        return {}
    if info.type == _LONG_NAME:
        return {"path": content.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    return _parse_pax(content)


def _parse_pax(content: bytes) -> _Extended:
    """Parse the path and the size from the records `length keyword=value` of a POSIX header."""
    found: _Extended = {}
    at = 0
    while at < len(content) and content[at]:
        digits, _, _ = content[at : at + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        keyword, equals, value = content[at + len(digits) + 1 : at + length - 1].partition(b"=")
        if not equals or content[at + length - 1 : at + length] != b"\n":
            raise _DamagedError("a damaged extended header")
        if keyword.startswith(b"GNU.sparse."):
            raise _DamagedError("a sparse member, pack it without --sparse")
        if keyword == b"path":
            found["path"] = value.rstrip(b"/").decode("utf-8", "surrogateescape")
        elif keyword == b"size":
            if not value.isdigit() or len(value) > 20:
                raise _DamagedError("a damaged extended header")
            found["size"] = int(value)
        at += length
    return found


def _check_name(name: str) -> str:
    if len(name) > MAX_NAME_LENGTH:
        raise _DamagedError(f"a name of {len(name):,} characters")
    return name


def _check_end(file: Source, path: Place, offset: int) -> None:
    """Raise UserError unless only zeros follow the last member."""
    rest = file.read_at(offset + BLOCK, MAX_PADDING_BYTES + 1)
    if len(rest) > MAX_PADDING_BYTES or rest.strip(b"\0"):
        raise UserError(f"{path}: data after its end at byte {offset:,}; if it is several tars in one, separate them")


def _round_up(size: int) -> int:
    """Round a content's size up to whole blocks."""
    return -(-size // BLOCK) * BLOCK
