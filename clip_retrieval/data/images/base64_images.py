"""Base64 images in one file, as Chinese-CLIP stores them: `image id <tab> base64` on each line.

Both base64 alphabets are read (`+/` and `-_`), with and without the padding at the end.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from clip_retrieval.data.images.decode import decode_rgb
from clip_retrieval.errors import UserError
from clip_retrieval.files import explain_errors, open_regular

_STANDARD = bytes.maketrans(b"-_", b"+/")
_BOM = b"\xef\xbb\xbf"
_BUFFER = 2**20  # bytes; a line holds a whole photograph
LONGEST_RECORD = 2**29  # bytes
MOST_DIGITS = 2000  # of an id that is a number; int() refuses more than 4,300


class Base64Images:
    """Images by index, decoded from base64 on access. Subclasses locate the base64 of each image.

    Attributes:
        path: file or folder of the images.
        keys: the ids as texts.
    """

    def __init__(self, path: Path, keys: Sequence[str]):
        self.path = path
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Image.Image:
        return decode_rgb(io.BytesIO(self.encoded(index)), self.name(index))

    def encoded(self, index: int) -> bytes:
        """Return the bytes of the image file. Raises UserError, naming the image, if its base64 is invalid."""
        return decode_base64(self.base64(index), self.name(index))

    def base64(self, index: int) -> bytes:
        """Return the base64 of an image."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return file, place in it and id of an image, for messages."""
        raise NotImplementedError

    def key(self, index: int) -> str:
        """Return the id of an image."""
        return self.keys[index]

    def stamp(self, index: int) -> tuple[int, int]:
        """Return the size of the base64 in bytes and the time of the file's last change in ns."""
        raise NotImplementedError


class TsvImages(Base64Images):
    """The images of a `{split}_imgs.tsv`, located in one pass over the file.

    Raises UserError as `read_tsv` does.
    """

    def __init__(self, path: Path):
        keys: list[str] = []
        begins, sizes, lines = array("q"), array("q"), array("q")
        for record in read_tsv(path):
            keys.append(record.key)
            begins.append(record.begin)
            sizes.append(len(record.base64))
            lines.append(record.line)
        super().__init__(path, keys)
        self._begins, self._sizes, self._lines = (np.asarray(column) for column in (begins, sizes, lines))

    def base64(self, index: int) -> bytes:
        # Opening the file each time costs a hundredth of decoding, and leaves processes and threads nothing to share.
        with explain_errors(self.name(index)), open_regular(self.path) as file:
            file.seek(self._begins[index])
            return file.read(self._sizes[index])

    def name(self, index: int) -> str:
        return f"{self.path}, line {self._lines[index]}, image {self.keys[index]}"

    def stamp(self, index: int) -> tuple[int, int]:
        return int(self._sizes[index]), os.stat(self.path).st_mtime_ns  # noqa: PTH116  a hundred thousand times


class TsvRecord(NamedTuple):
    """A line of a `{split}_imgs.tsv`: image id, base64, line number, and the byte at which the base64 begins."""

    key: str
    base64: bytes
    line: int
    begin: int


def read_tsv(path: Path) -> Iterator[TsvRecord]:
    """Yield the records of a `{split}_imgs.tsv`; empty lines are skipped.

    Raises UserError, naming file and line, if a line is not an id, a tab and base64, an id is repeated, or the file
    holds no images.
    """
    line_of: dict[str, int] = {}
    number = end = 0
    with explain_errors(path), io.BufferedReader(open_regular(path).detach(), _BUFFER) as file:
        while line := file.readline(LONGEST_RECORD + 1):
            number += 1
            if len(line) > LONGEST_RECORD:
                raise UserError(f"{path}, line {number}: longer than {LONGEST_RECORD:,} bytes, as no image is")

            # parse the line
            key, tab, content = line.partition(b"\t")
            begin, end = end + len(key) + 1, end + len(line)
            if not tab and not line.strip():
                continue
            if problem := _find_problem(key, tab, content):
                raise UserError(f"{path}, line {number}: {problem}")

            # refuse a duplicate id
            image_id = _decode_key(path, number, key)
            if (first := line_of.setdefault(image_id, number)) != number:
                raise UserError(f"{path}, line {number}: image {image_id} is on line {first} already; keep one")
            yield TsvRecord(image_id, content.rstrip(), number, begin)
    if not line_of:
        raise UserError(f"{path}: holds no images")


def _find_problem(key: bytes, tab: bytes, content: bytes) -> str | None:
    """Return the problem of a line, or None if it is valid."""
    shown = key[:40].decode(errors="replace")
    if not tab:
        return f"not an image id, a tab and base64 (it begins {shown!r})"
    if b"\t" in content:
        return f"holds several records (a line break is missing after image {shown}?); write one record per line"
    if not key.strip():
        return "the image has no id"
    if not content.strip():
        return f"image {shown} is empty"
    return None


def _decode_key(path: Path, number: int, key: bytes) -> str:
    try:
        return key.removeprefix(_BOM if number == 1 else b"").strip().decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}, line {number}: the image id {key[:40]!r} is not UTF-8 text") from None


def decode_base64(text: bytes, name: str) -> bytes:
    """Decode base64. Raises UserError, with `name`, if it is invalid."""
    try:
        return base64.b64decode(pad_base64(text).translate(_STANDARD), validate=True)
    except binascii.Error as error:
        raise UserError(f"{name}: not base64 ({error}); write it again or delete it") from None


def pad_base64(text: bytes) -> bytes:
    """Add the padding that Chinese-CLIP's reader needs to base64."""
    return text + b"=" * (-len(text) % 4)


def is_number(key: str) -> bool:
    """Whether an id is a whole number in its usual form: 7 or -7, not 007."""
    digits = key.removeprefix("-")
    return key == "0" or (len(digits) <= MOST_DIGITS and digits.isascii() and digits.isdecimal() and digits[0] != "0")


def infer_id_types(keys: Sequence[str], named: Iterable[int | str] = ()) -> list[int | str]:
    """Turn image ids into numbers or texts; a tsv and an LMDB do not distinguish them.

    Args:
        keys: the ids as texts.
        named: the ids by which the captions refer to images; their types decide. Any other id is a number if it has
            the form of one, unless the captions refer to images by numbers in quotes.
    """
    typed: dict[str, int | str] = {}
    for image_id in named:
        typed.setdefault(str(image_id), image_id)
    quoted = any(isinstance(image_id, str) and is_number(image_id) for image_id in typed.values())
    return [typed[key] if key in typed else int(key) if is_number(key) and not quoted else key for key in keys]
