"""Reader of LMDB files, page by page, to report damage as an error.

liblmdb maps the file to memory and trusts every number in it: one flipped bit can crash the process. This reader reads
each page with `pread` and checks each number before use. It supports the main database of LMDB's format 1 (versions
0.9), without duplicate keys, as Chinese-CLIP writes it. Names follow liblmdb's mdb.c.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from clip_retrieval.errors import UserError
from clip_retrieval.files import explain_errors, open_regular

MAGIC, VERSION = 0xBEEFC0DE, 1
BRANCH, LEAF, OVERFLOW, META = 1, 2, 4, 8  # page kinds
BIGDATA = 1  # node flag: the value has its own pages
NO_ROOT = 2**64 - 1
DEEPEST = 32  # levels of a tree, liblmdb's CURSOR_STACK
MAX_CACHED_BRANCHES = 1000  # pages, 8 MB

_PAGE = struct.Struct("<Q 2x H H H")  # number, kind, end of the offsets, begin of the nodes
_BIG_PAGE = struct.Struct("<Q 2x H I")  # number, kind, pages
_KEY_SIZE = struct.Struct("<H")
_NODE = struct.Struct("<H H H H")  # value size or child number (low, high), flags (or child number), key size
# The first two pages: kind, magic, version, page size; flags, depth and root of the main database; last page,
# transaction number.
_META = struct.Struct("<10x H 4x I I 8x 8x I 44x 4x H H 32x Q Q Q")


class _Meta(NamedTuple):
    kind: int
    magic: int
    version: int
    page_size: int
    flags: int
    depth: int
    root: int
    last_page: int
    transaction: int


class LmdbReader:
    """The keys and values of an LMDB folder, as of its last transaction.

    Forked processes may share it, as it has no file position. A copy by pickle opens the folder again.

    Args:
        folder: folder of data.mdb.
        largest: size limit of values in bytes.

    Raises:
        UserError: here and in all methods, naming the file, if it is not an LMDB, cut short or damaged, or a value is
            too large.
    """

    def __init__(self, folder: Path, largest: int):
        self._folder = folder
        self.path = folder / "data.mdb"
        self.largest = largest
        self._branches: dict[int, tuple[int, bytes, tuple[int, ...]]] = {}
        try:
            self._file = open_regular(self.path)
            self._size = os.fstat(self._file.fileno()).st_size
            self._read_metas()
        except OSError as error:
            raise UserError(f"{folder}: not an LMDB folder ({self.path.name}: {error.strerror})") from None

    def __reduce__(self) -> tuple[type[LmdbReader], tuple[Path, int]]:
        return LmdbReader, (self._folder, self.largest)

    def _read_metas(self) -> None:
        first = self._read_meta(0)
        second = self._read_meta(first.page_size)
        meta = second if second.transaction > first.transaction else first
        self._page_size, self._last_page = meta.page_size, meta.last_page
        needed = (meta.last_page + 1) * meta.page_size
        if self._size < needed:
            raise UserError(
                f"{self.path}: cut short ({self._size:,} of {needed:,} bytes are present); build or fetch it again"
            )
        if meta.flags:
            raise UserError(
                f"{self.path}: an LMDB with duplicate or special keys, not one of Chinese-CLIP; build it again"
            )
        if meta.root != NO_ROOT and not 1 <= meta.depth <= DEEPEST:
            self._fail(f"its tree has {meta.depth} levels")
        self._root, self._depth = meta.root, meta.depth

    def _read_meta(self, begin: int) -> _Meta:
        meta = _Meta(*_META.unpack(os.pread(self._file.fileno(), _META.size, begin).ljust(_META.size, b"\0")))
        size = meta.page_size
        if meta.magic != MAGIC or meta.kind != META or not 256 <= size <= 65536 or size & (size - 1):
            raise UserError(f"{self.path}: not an LMDB file, or damaged; build or fetch it again")
        if meta.version != VERSION:
            raise UserError(f"{self.path}: unknown LMDB format {meta.version}; build it with LMDB 0.9")
        return meta

    def get(self, key: bytes) -> bytes | None:
        """Return the value of a key; None if the key is missing."""
        found = self._find(key)
        return None if found is None else self._read_value(*found)

    def size(self, key: bytes) -> int | None:
        """Return the size of a key's value in bytes, without reading it; None if the key is missing."""
        found = self._find(key)
        return None if found is None else self._read_node(*found)[1]

    def iter_keys(self) -> Iterator[bytes]:
        """Yield all keys in order."""
        for page, offset in self._iter_nodes(b""):
            yield self._read_key(page, offset)

    def items(self, first: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Yield the keys from `first` on, in order, with their values."""
        total = 0
        for page, offset in self._iter_nodes(first):
            value = self._read_value(page, offset)
            total += len(value)
            if total > self._size:
                self._fail("several keys share a value")  # a small file could yield any number of large values
            yield self._read_key(page, offset), value

    def _find(self, key: bytes) -> tuple[bytes, int] | None:
        """Find the leaf page of a key and the offset of its node."""
        if self._root == NO_ROOT:
            return None
        page, offsets = self._read_page(self._root, 1)
        for level in range(2, self._depth + 1):
            child = self._search(key, page, offsets, first=1)
            page, offsets = self._read_page(self._read_child(page, offsets[child]), level)
        node = self._search(key, page, offsets, first=0)
        if node < 0 or self._read_key(page, offsets[node]) != key:
            return None
        return page, offsets[node]

    def _search(self, key: bytes, page: bytes, offsets: tuple[int, ...], first: int) -> int:
        """Find the last node from `first` on whose key is not greater; `first` - 1 if all are greater."""
        low, high = first, len(offsets)
        while low < high:
            middle = (low + high) // 2
            begin = offsets[middle] + _NODE.size
            size = _KEY_SIZE.unpack_from(page, min(begin, len(page)) - 2)[0]
            if page[begin : begin + size] <= key:
                low = middle + 1
            else:
                high = middle
        return low - 1

    def _iter_nodes(self, first: bytes) -> Iterator[tuple[bytes, int]]:
        """Yield page and offset of all leaf nodes from the key `first` on."""
        if self._root == NO_ROOT:
            return
        last = None
        waiting = [(self._root, 1)]  # pages to visit, the next one last
        while waiting:
            number, level = waiting.pop()
            page, offsets = self._read_page(number, level)
            if level < self._depth:
                begin = self._search(first, page, offsets, first=1)
                waiting += [(self._read_child(page, offset), level + 1) for offset in reversed(offsets[begin:])]
                continue
            for offset in offsets:
                key = self._read_key(page, offset)
                # A cycle in a damaged tree shows up as keys that repeat.
                if last is not None and key <= last:
                    self._fail(f"page {number} is out of order")
                last = key
                if key >= first:
                    yield page, offset

    def _read_page(self, number: int, level: int) -> tuple[bytes, tuple[int, ...]]:
        """Read a page of the tree at a level (1 is the root) and the offsets of its nodes, at least one."""
        if (cached := self._branches.get(number)) is not None and cached[0] == level:
            return cached[1:]
        page = self._read(number, 0, self._page_size)
        found, kind, lower, upper = _PAGE.unpack_from(page)
        if found != number or kind != (LEAF if level == self._depth else BRANCH):
            self._fail(f"page {number} is not part of the tree")
        if not _PAGE.size < lower <= upper <= self._page_size or lower % 2:
            self._fail(f"page {number} has an invalid layout")
        offsets = struct.unpack_from(f"<{(lower - _PAGE.size) // 2}H", page, _PAGE.size)
        if kind == BRANCH and len(self._branches) < MAX_CACHED_BRANCHES:
            self._branches[number] = level, page, offsets
        return page, offsets

    def _read(self, number: int, begin: int, size: int) -> bytes:
        if not 2 <= number <= self._last_page:
            self._fail(f"there is no page {number}")
        with explain_errors(self.path):
            content = os.pread(self._file.fileno(), size, number * self._page_size + begin)
        if len(content) != size:
            self._fail(f"page {number} is cut short")
        return content

    def _read_node(self, page: bytes, offset: int) -> tuple[int, int, int]:
        """Return begin and size of the node's value, and the node's flags."""
        if offset + _NODE.size > len(page):
            self._fail("a node lies outside its page")
        low, high, flags, key_size = _NODE.unpack_from(page, offset)
        return offset + _NODE.size + key_size, low | high << 16, flags

    def _read_key(self, page: bytes, offset: int) -> bytes:
        end = self._read_node(page, offset)[0]
        if end > len(page):
            self._fail("a key lies outside its page")
        return page[offset + _NODE.size : end]

    def _read_child(self, page: bytes, offset: int) -> int:
        _, low, high = self._read_node(page, offset)
        return low | high << 32

    def _read_value(self, page: bytes, offset: int) -> bytes:
        begin, size, flags = self._read_node(page, offset)
        if flags & ~BIGDATA:
            self._fail("a value is another database")
        if size > self.largest:
            raise UserError(f"{self.path}: holds a value of {size:,} bytes, too large; build it again")
        if flags != BIGDATA:
            if begin + size > len(page):
                self._fail("a value lies outside its page")
            return page[begin : begin + size]
        if begin + 8 > len(page):
            self._fail("a value lies outside its page")
        number = int.from_bytes(page[begin : begin + 8], "little")
        found, kind, pages = _BIG_PAGE.unpack(self._read(number, 0, _BIG_PAGE.size))
        if found != number or kind != OVERFLOW or _BIG_PAGE.size + size > pages * self._page_size:
            self._fail(f"page {number} does not hold the value of its node")
        if number * self._page_size + _BIG_PAGE.size + size > self._size:
            self._fail(f"page {number} is cut short")
        return self._read(number, _BIG_PAGE.size, size)

    def _fail(self, problem: str) -> NoReturn:
        raise UserError(f"{self.path}: damaged ({problem}); build or fetch it again")
