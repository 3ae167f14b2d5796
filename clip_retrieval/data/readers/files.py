"""What readers share: files read with an error that names file and line, and the words for splits."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_retrieval.arrays import read_npy
from clip_retrieval.data.jsonl import parse_json
from clip_retrieval.errors import UserError, reason
from clip_retrieval.files import open_regular
from clip_retrieval.memory import memory_limit

# The split id lists that come with the project.
ANNOTATIONS = Path(__file__).resolve().parents[3] / "datasets" / "annotations"

# What the splits are called in files.
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}

CHUNK = 2**20  # bytes read at a time
# A gzip of more bytes than BOMB_FROM that holds BOMB_RATIO times its size is a bomb: captions shrink to a fifth.
BOMB_FROM, BOMB_RATIO = 2**28, 200
HALVES = re.compile("[\ud800-\udfff]")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark, gzipped if its name ends in .gz.

    Raises UserError, naming the file and where possible the line, if it is missing, something else, or too large.
    """
    try:
        data = _read_bytes(path)
        text = data.decode("utf-8-sig")
        if "\0" in text:
            line = data.count(b"\n", 0, data.index(0)) + 1
            raise UserError(f"{path}, line {line}: holds a NUL, as UTF-16 and binary files do; save it as UTF-8")
        return text
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, not a file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); check the path") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise UserError(f"{path}, line {line}: not UTF-8 text (byte 0x{byte:02x}); save it as UTF-8") from None
    except MemoryError:
        raise UserError(f"{path}: larger than the memory of this machine; split it") from None


def _read_bytes(path: Path) -> bytearray:
    """The content of a file, decompressed. Raises UserError for more than a quarter of the memory, and for a bomb.

    What is read becomes text, and then objects: a file of a quarter of the memory fills all of it.
    """
    limit = memory_limit() // 4
    data = bytearray()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        source = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        while chunk := source.read(CHUNK):
            data += chunk
            if len(data) > limit:
                raise UserError(f"{path}: holds more than {limit:,} bytes, a quarter of the memory here; split it")
            if source is not file and len(data) > max(BOMB_FROM, BOMB_RATIO * size):
                raise UserError(
                    f"{path}: {size:,} bytes unpack to more than {len(data):,}, as no captions do; fetch anew"
                )
    return data


def read_json(path: Path) -> Any:
    """The content of a JSON file (.json or .json.gz). Raises UserError, naming file and line, if it is none."""
    try:
        return parse_json(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: broken JSON ({error.msg}); fetch it again"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: broken JSON ({error}); fetch it again") from None


def read_ids(path: Path) -> np.ndarray:
    """The ids in a .npy file as int64 (ids,). Raises UserError, naming the file, if it holds something else."""
    ids = read_npy(path)
    if ids.dtype.kind not in "iu" or ids.ndim != 1 or (len(ids) and ids.max() > np.iinfo(np.int64).max):
        raise UserError(f"{path}: not a .npy file of whole numbers in one row; write it with numpy.save")
    return ids.astype(np.int64)


def clean_caption(text: str) -> str:
    """The caption without blanks around it and on one line, in characters that can be written and tokenised."""
    text = mend_characters(text.strip())
    return " ".join(text.splitlines()) if "\n" in text or "\r" in text else text


def mend_characters(text: str) -> str:
    """The text with U+FFFD for half surrogate pairs, which no tokenizer takes; two halves of one pair are joined.

    They come from JSON that was cut within an emoji (`"\\ud83d"`), and from names of files that are not UTF-8.
    """
    if text.isascii() or not HALVES.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check_root(root: Path) -> None:
    """Raise UserError unless `root` is a folder."""
    if not root.is_dir():
        what = "not a folder" if root.exists() else "no such folder"
        raise UserError(f"{root}: {what}; give the folder of the data set as --dataset_root")


def first_file(candidates: Iterable[Path]) -> Path | None:
    """The first of the candidates that is a file."""
    return next((path for path in candidates if path.is_file()), None)


def only_file(root: Path, patterns: Sequence[str]) -> Path:
    """The one file in `root` that matches a pattern; UserError where there are none or several."""
    check_root(root)
    # Archives made on macOS bring a ._file along with every file.
    found = sorted(path for pattern in patterns for path in root.glob(pattern) if not path.name.startswith("."))
    if not found:
        raise UserError(f"{root}: holds no {' or '.join(patterns)}; name the captions file with --annotations")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{root}: holds several captions files ({names}); name one with --annotations")
    return found[0]
