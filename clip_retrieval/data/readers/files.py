"""What readers share: files read with an error that names file and line, and the words for splits."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_retrieval.errors import UserError

# The split id lists that come with the project.
ANNOTATIONS = Path(__file__).resolve().parents[3] / "datasets" / "annotations"

# What the splits are called in files.
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark, gzipped if its name ends in .gz."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, not a file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); fetch it again") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 text (byte 0x{data[error.start]:02x}); save it as UTF-8"
        ) from None


def read_json(path: Path) -> Any:
    """The content of a JSON file (.json or .json.gz)."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: broken JSON ({error.msg}); fetch it again"
        ) from None
    except RecursionError:
        raise UserError(f"{path}: broken JSON (nested too deeply); fetch it again") from None


def read_ids(path: Path) -> np.ndarray:
    """The ids in a .npy file as int64 (ids,)."""
    try:
        ids = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    # EOFError is an empty file; ValueError a pickle or no .npy at all.
    except (OSError, EOFError, ValueError):
        raise UserError(f"{path}: not a .npy file of whole numbers") from None
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise UserError(f"{path}: not a .npy file of whole numbers in one row")
    return ids.astype(np.int64)


def clean_caption(text: str) -> str:
    """The caption without blanks around it and on one line."""
    text = text.strip()
    return " ".join(text.splitlines()) if "\n" in text or "\r" in text else text


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
