"""Images that stand as base64 in one file, as Chinese-CLIP keeps them: `image id <tab> base64` on each line.

Both alphabets of base64 are read (`+/` and `-_`), with and without the padding at the end.
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
from clip_retrieval.errors import UserError, describe
from clip_retrieval.files import open_regular

_STANDARD = bytes.maketrans(b"-_", b"+/")
_BOM = b"\xef\xbb\xbf"
_BUFFER = 2**20  # a line is a whole photograph
LONGEST_LINE = 2**29  # bytes
MOST_DIGITS = 2000  # of an id that is a number; int() refuses more than 4,300


class Base64Images:
    """Images by index, decoded from base64 when asked for. Subclasses say where the base64 of an image stands.

    Attributes:
        path: the file or folder that they are in.
        keys: the id of each as it is written there.
    """

    def __init__(self, path: Path, keys: Sequence[str]):
        self.path = path
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Image.Image:
        return decode_rgb(io.BytesIO(self.encoded(index)), self.name(index))

    def encoded(self, index: int) -> bytes:
        """The bytes of the image file. Raises UserError, naming the image, where they are no base64."""
        return decode_base64(self.base64(index), self.name(index))

    def base64(self, index: int) -> bytes:
        """What stands in the file."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Where the image stands, and its id."""
        raise NotImplementedError

    def stamp(self, index: int) -> tuple[int, int]:
        """Size of what stands in the file, and time of the file's last change (ns)."""
        raise NotImplementedError


class TsvImages(Base64Images):
    """The images of a `{split}_imgs.tsv`. One pass over the file notes where each of them begins.

    Raises UserError, naming file and line, where a line is not an id and base64, or an id stands there twice.
    """

    def __init__(self, path: Path):
        keys: dict[str, int] = {}
        begins, sizes, lines = array("q"), array("q"), array("q")
        for record in read_tsv(path):
            if (first := keys.setdefault(record.key, record.line)) != record.line:
                raise UserError(f"{path}, line {record.line}: image {record.key} is on line {first} already; keep one")
            begins.append(record.begin)
            sizes.append(len(record.base64))
            lines.append(record.line)
        if not keys:
            raise UserError(f"{path}: holds no images")
        super().__init__(path, list(keys))
        self._begins, self._sizes, self._lines = (np.asarray(column) for column in (begins, sizes, lines))

    def base64(self, index: int) -> bytes:
        # Opened each time, at a hundredth of what decoding costs: nothing to share between processes or threads.
        try:
            with open_regular(self.path) as file:
                file.seek(self._begins[index])
                return file.read(self._sizes[index])
        except OSError as error:
            raise UserError(f"{self.name(index)}: cannot be read ({error.strerror})") from None

    def name(self, index: int) -> str:
        return f"{self.path}, line {self._lines[index]}, image {self.keys[index]}"

    def stamp(self, index: int) -> tuple[int, int]:
        return int(self._sizes[index]), os.stat(self.path).st_mtime_ns  # noqa: PTH116  a hundred thousand times


class TsvRecord(NamedTuple):
    """A line of a `{split}_imgs.tsv`: where in the file its base64 begins, and where the next line does."""

    key: str
    base64: bytes
    line: int
    begin: int
    end: int


def read_tsv(path: Path, begin: int = 0, line: int = 0) -> Iterator[TsvRecord]:
    """The records of a `{split}_imgs.tsv`, from byte `begin` on, after line number `line`. Empty lines are left out.

    Raises UserError, naming file and line, where a line is not one id, a tab and base64.
    """
    try:
        with io.BufferedReader(open_regular(path).detach(), _BUFFER) as file:
            file.seek(begin)
            while text := file.readline(LONGEST_LINE + 1):
                line += 1
                if len(text) > LONGEST_LINE:
                    raise UserError(f"{path}, line {line}: longer than {LONGEST_LINE:,} bytes, as no image is")
                key, tab, content = text.partition(b"\t")
                first, begin = begin + len(key) + 1, begin + len(text)
                if not tab and not text.strip():
                    continue
                if problem := _problem(key, tab, content):
                    raise UserError(f"{path}, line {line}: {problem}")
                yield TsvRecord(_key(path, line, key), content.rstrip(), line, first, begin)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({describe(error)}); check the path") from None


def _problem(key: bytes, tab: bytes, content: bytes) -> str | None:
    """What is wrong with a line; None where nothing is."""
    shown = key[:40].decode(errors="replace")
    if not tab:
        return f"not an image id, a tab and base64 (it begins {shown!r})"
    if b"\t" in content:
        return (
            f"several records are glued together (a line break is missing after image {shown}?); each stands on a "
            "line of its own"
        )
    if not key.strip():
        return "the image has no id"
    if not content.strip():
        return f"image {shown} is empty"
    return None


def _key(path: Path, number: int, key: bytes) -> str:
    try:
        return key.removeprefix(_BOM if number == 1 else b"").strip().decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}, line {number}: the image id {key[:40]!r} is not UTF-8 text") from None


def decode_base64(text: bytes, name: str) -> bytes:
    """What base64 stands for. Raises UserError, with `name`, where it is none."""
    try:
        return base64.b64decode(pad_base64(text).translate(_STANDARD), validate=True)
    except binascii.Error as error:
        raise UserError(f"{name}: not base64 ({error}); write it anew or take it out") from None


def pad_base64(text: bytes) -> bytes:
    """Base64 with the padding that Chinese-CLIP's reader needs."""
    return text + b"=" * (-len(text) % 4)


def is_number(key: str) -> bool:
    """Whether an id is what a whole number is written as: 7 or -7, not 007."""
    digits = key.removeprefix("-")
    return key == "0" or (len(digits) <= MOST_DIGITS and digits.isascii() and digits.isdecimal() and digits[0] != "0")


def infer_id_types(keys: Sequence[str], named: Iterable[int | str] = ()) -> list[int | str]:
    """Image ids as numbers or texts, which a tsv and an LMDB do not tell apart.

    An id is as `named` has it, the ids by which texts name their images. Others are numbers if they are written as
    such, unless the texts name images by numbers in quotes.
    """
    written: dict[str, int | str] = {}
    for image_id in named:
        written.setdefault(str(image_id), image_id)
    quoted = any(isinstance(image_id, str) and is_number(image_id) for image_id in written.values())
    return [written[k] if k in written else int(k) if is_number(k) and not quoted else k for k in keys]
