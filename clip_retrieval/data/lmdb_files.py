"""Chinese-CLIP's LMDB folders, read: `imgs` (image id -> base64), `pairs` (number -> image id, text id, text, pickled).

Pickles are read without running anything: they may hold numbers and texts, nothing else.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

import lmdb

from clip_retrieval.data.base64_images import Base64Images
from clip_retrieval.errors import UserError

NUM_IMAGES = b"num_images"
NUM_SAMPLES = b"num_samples"
# Keys of ours in `pairs`, which Chinese-CLIP does not look at: the lines of texts that no image answers.
UNANSWERED = b"text:"

# Of the pages that an LMDB begins with: magic, bytes of a page, last page, number of the transaction.
_META = struct.Struct("=16x I 4x 8x 8x I 92x Q Q")
_MAGIC = 0xBEEFC0DE
_PAIRS = {(image_id, text_id, str) for image_id in (int, str) for text_id in (int, str)}
_Taken = TypeVar("_Taken")

# LMDB may not be opened twice in a process. This is no reason against going on with it in a forked one: opened to read,
# and without locks, it is a memory map and nothing more.
_opened: weakref.WeakValueDictionary[tuple[int, int], lmdb.Environment] = weakref.WeakValueDictionary()


def open_lmdb(folder: Path) -> lmdb.Environment:
    """An LMDB folder for reading; the one that is open in this process already, if it is.

    Raises UserError where it is none, or is cut short: reading it would kill the process.
    """
    data = folder / "data.mdb"
    try:
        _check_whole(data)
        found = data.stat()
        key = (found.st_dev, found.st_ino)
        env = _opened.get(key)
        if env is None:
            env = lmdb.open(
                os.fsencode(folder), readonly=True, create=False, lock=False, readahead=False, meminit=False
            )
            _opened[key] = env
    except OSError as error:
        raise UserError(f"{folder}: not an LMDB folder ({data.name}: {error.strerror})") from None
    except lmdb.Error as error:
        raise _unreadable(folder, error) from None
    return env


def _check_whole(data: Path) -> None:
    """Raise UserError unless the file has all the pages that its two first ones speak of."""
    with data.open("rb") as file:
        first = _META.unpack(file.read(_META.size).ljust(_META.size, b"\0"))
        file.seek(first[1])
        second = _META.unpack(file.read(_META.size).ljust(_META.size, b"\0"))
        size = file.seek(0, io.SEEK_END)
    if first[0] != _MAGIC or second[0] != _MAGIC:
        raise UserError(f"{data}: not an LMDB file; build it anew")
    _, page, last_page, _ = max(first, second, key=lambda meta: meta[3])
    needed = (last_page + 1) * page
    if size < needed:
        raise UserError(f"{data}: cut short ({size:,} of {needed:,} bytes are there); build or fetch it anew")


@contextmanager
def reading(folder: Path) -> Iterator[lmdb.Transaction]:
    """A look into an LMDB folder. An error of LMDB's within it is a UserError that names the folder."""
    try:
        with open_lmdb(folder).begin() as transaction:
            yield transaction
    except lmdb.Error as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: lmdb.Error) -> UserError:
    return UserError(f"{folder}: cannot be read as an LMDB ({str(error).removeprefix(f'{folder}: ')}); build it anew")


def count(transaction: lmdb.Transaction, folder: Path, key: bytes) -> int:
    """The number of images or pairs, which is written at the very end. Raises UserError where it is not there."""
    value = transaction.get(key)
    if value is None or not value.isdigit():
        raise UserError(f"{folder}: not a whole LMDB of Chinese-CLIP's (no {key.decode()}); build it anew")
    return int(value)


class LmdbImages(Base64Images):
    """The images of an `imgs` folder, in the order of their keys. Each process opens it when it first reads."""

    def __init__(self, folder: Path):
        with reading(folder) as transaction:
            count(transaction, folder, NUM_IMAGES)
            keys = [bytes(k) for k in transaction.cursor().iternext(values=False) if k != NUM_IMAGES]
        try:
            super().__init__(folder, [key.decode() for key in keys])
        except UnicodeDecodeError as error:
            raise UserError(f"{folder}: the image id {error.object[:40]!r} is not UTF-8 text; build it anew") from None
        if not keys:
            raise UserError(f"{folder}: holds no images")
        self._env: lmdb.Environment | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_env": None}

    def base64(self, index: int) -> bytes:
        return self._found(index, bytes)

    def _found(self, index: int, take: Callable[[memoryview], _Taken]) -> _Taken:
        """What `take` makes of the base64 of an image, which is not copied for it."""
        if self._env is None:
            self._env = open_lmdb(self.path)
        try:
            with self._env.begin(buffers=True) as transaction:
                value = transaction.get(self.keys[index].encode())
                if value is None:
                    raise UserError(f"{self.name(index)}: no longer there; start again")
                return take(value)
        except lmdb.Error as error:
            raise _unreadable(self.path, error) from None

    def name(self, index: int) -> str:
        return f"{self.path}, key {self.keys[index]}"

    def stamp(self, index: int) -> tuple[int, int]:
        return self._found(index, len), (self.path / "data.mdb").stat().st_mtime_ns


def read_pairs(folder: Path) -> Iterator[tuple[int, tuple[int | str, int | str, str]]]:
    """(key, (image id, text id, text)) of each pair of a `pairs` folder, in order.

    Raises UserError, naming the folder and the key, where one is missing or something else.
    """
    with reading(folder) as transaction:
        for number in range(count(transaction, folder, NUM_SAMPLES)):
            pickled = transaction.get(str(number).encode())
            if pickled is None:
                raise UserError(f"{folder}, key {number}: missing; build it anew")
            yield number, _unpickle(pickled, f"{folder}, key {number}")


def read_unanswered(folder: Path) -> list[dict]:
    """The texts in a `pairs` folder of ours that no image answers, as their lines had them."""
    with reading(folder) as transaction:
        cursor = transaction.cursor()
        texts: list[dict] = []
        if cursor.set_range(UNANSWERED):
            for key, line in cursor:
                if not key.startswith(UNANSWERED):
                    break
                try:
                    texts.append(json.loads(line))
                except ValueError:
                    raise UserError(f"{folder}, key {key.decode()}: broken JSON; build it anew") from None
    return texts


class _PlainUnpickler(pickle.Unpickler):
    """Makes numbers, texts and collections of them; whatever names a class or a function is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _unpickle(pickled: bytes, where: str) -> tuple[int | str, int | str, str]:
    try:
        pair = _PlainUnpickler(io.BytesIO(pickled)).load()
    except Exception as error:  # the unpickler raises nearly anything on broken input
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where}: refused ({reason}); a pair holds an image id, a text id and a text only") from None
    if type(pair) is not tuple or tuple(map(type, pair)) not in _PAIRS:
        raise UserError(f"{where}: not an image id, a text id and a text, but {repr(pair)[:60]}; build it anew")
    return pair
