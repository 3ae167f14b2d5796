"""The index of a folder of photographs on disk.

    index.jsonl          a line about the model, then one for each file:
                         {"name": "2019/beach.jpg", "size": 84211, "mtime": 1564650000000000000, "digest": "5e...",
                          "width": 1024, "height": 768}, or a "problem" if it cannot be read
    index-features-3.npy float32 (readable images, dim), L2-normalised, in the order of the lines
    index-part-4.jsonl, index-features-4.npy    the same, of images that an unfinished update has encoded

A .jsonl file names its features and is renamed to its place after them: it is there completely or not at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_retrieval.arrays import read_npy
from clip_retrieval.errors import UserError
from clip_retrieval.files import to_json, write_atomic
from clip_retrieval.jsonl import read_records

INDEX = "index.jsonl"
VERSION = 1
_FEATURES = re.compile(r"index-features-(\d{1,9})\.npy")
_PART = re.compile(r"index-part-(\d{1,9})\.jsonl")
_MODEL = {"source": dict, "name": str, "fingerprint": str, "dim": int}
_TYPES = {"name": str, "size": int, "mtime": int, "digest": str, "width": int, "height": int, "problem": str}


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the index.

    Attributes:
        name: path relative to the folder of the photographs, with slashes.
        size: bytes.
        mtime: time of the last change (ns); None if it may change again without a later time.
        digest: hash of the content; None if the file could not be read.
        width, height: pixels of the upright image.
        problem: why the image cannot be used; None if it can.
    """

    name: str
    size: int
    mtime: int | None
    digest: str | None
    width: int | None = None
    height: int | None = None
    problem: str | None = None


@dataclass
class Table:
    """The files of an index, or of a part of it.

    Attributes:
        path: the .jsonl file.
        model: the record of the model; see `encoder.Encoder.record`.
        entries: the files.
        features_path: the .npy file of the features, float32 (readable files, dim).
        rows: int64 (files,), the row of each file's features; -1 if it has a problem.
    """

    path: Path
    model: dict[str, Any]
    entries: list[Entry]
    features_path: Path
    rows: np.ndarray

    def map_features(self) -> np.ndarray:
        """Map the features. The many parts of a long run are not mapped at a time: each holds an open file."""
        return read_npy(self.features_path, memory_map=True)


def read_index(folder: Path, photos: Path) -> Table:
    """Read a complete index. Raises UserError if there is none, or it is damaged."""
    if not (folder / INDEX).is_file():
        raise UserError(f"{photos} has no index in {folder}; make it: search.py index {photos} --resume CKPT")
    return read_table(folder / INDEX)


def read_tables(folder: Path) -> list[Table]:
    """Read the index, if there is one, and the parts of an unfinished update, oldest first."""
    paths = [folder / INDEX, *(part_path(folder, number) for number in sorted(_numbers(folder, _PART)))]
    return [read_table(path) for path in paths if path.is_file()]


def part_path(folder: Path, number: int | None = None) -> Path:
    """The file of a part, by default of the next one."""
    return folder / f"index-part-{max(_numbers(folder, _PART), default=0) + 1 if number is None else number}.jsonl"


def _numbers(folder: Path, pattern: re.Pattern[str]) -> list[int]:
    return [int(match[1]) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]


def read_table(path: Path) -> Table:
    """Read a .jsonl file and map its features. Raises UserError, naming the line, if they are damaged."""
    # the line about the model
    records = read_records(path)
    _, head = next(records, (0, {}))
    name, model = head.get("features"), head.get("model")
    if not isinstance(name, str) or not _FEATURES.fullmatch(name) or not isinstance(model, dict):
        raise UserError(f"{path}: not an index of search.py; delete it and index the folder again")
    if head.get("version") != VERSION or not all(isinstance(model.get(key), kind) for key, kind in _MODEL.items()):
        raise UserError(f"{path}: written by another version of search.py; delete it and index the folder again")
    # the files
    entries = []
    for line, record in records:
        try:
            entries.append(_parse_entry(record))
        except ValueError as error:
            raise UserError(f"{path}, line {line}: {error}; delete the file and index the folder again") from None
    # the features
    is_readable = np.fromiter((entry.problem is None for entry in entries), bool, len(entries))
    table = Table(path, model, entries, path.with_name(name), np.where(is_readable, is_readable.cumsum() - 1, -1))
    features = table.map_features()
    if features.dtype != np.float32 or features.shape != (is_readable.sum(), model["dim"]):
        raise UserError(
            f"{table.features_path}: not the features of {path.name}; delete both and index the folder again"
        )
    return table


def _parse_entry(record: dict[str, Any]) -> Entry:
    values = [record.get(key) for key in _TYPES]
    for (key, kind), value in zip(_TYPES.items(), values):
        if value is not None and type(value) is not kind:
            raise ValueError(f'"{key}" is invalid')
    name, _, _, _, width, height, problem = values
    # An index may come with photographs from elsewhere: it must not name files outside their folder.
    if not name or "\0" in name or os.path.isabs(name) or ".." in name.replace(os.sep, "/").split("/"):  # noqa: PTH117
        raise ValueError("no valid name of a file")
    if problem is None and min(width or 0, height or 0) < 1:
        raise ValueError("no width and height")
    return Entry(*values)  # type: ignore[arg-type]


def write_table(
    path: Path, model: dict[str, Any], entries: Sequence[Entry], dim: int, features: Iterable[np.ndarray]
) -> None:
    """Write a .jsonl file and its features, given in blocks (n, dim) that together have a row for each readable file.

    Raises OSError if the folder cannot be written.
    """
    number = max(_numbers(path.parent, _FEATURES), default=0) + 1
    features_path = path.with_name(f"index-features-{number}.npy")
    shape = (sum(entry.problem is None for entry in entries), dim)
    with write_atomic(features_path) as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in features:
            file.write(np.ascontiguousarray(block, "<f4").data)
    with write_atomic(path) as file:
        head = {"version": VERSION, "model": model, "features": features_path.name}
        file.write(to_json(head) + b"\n")
        for entry in entries:
            record = {name: value for name in _TYPES if (value := getattr(entry, name)) is not None}
            file.write(to_json(record) + b"\n")


def delete_unused(folder: Path, index: Table) -> None:
    """Delete the parts of `folder`, and the features that the index does not use."""
    for path in list(folder.iterdir()):
        is_features = _FEATURES.fullmatch(path.name) and path != index.features_path
        if is_features or _PART.fullmatch(path.name):
            path.unlink(missing_ok=True)
