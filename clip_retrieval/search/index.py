"""The index of a folder of photographs on disk.

    index.jsonl          a line about the model, then one for each file:
                         {"name": "2019/beach.jpg", "size": 84211, "mtime": 1564650000000000000, "digest": "5e...",
                          "width": 1024, "height": 768}, or a "problem" if it cannot be read
    index-features-3.npy float32 (readable images, dim), L2-normalised, in the order of the lines
    index-faiss-3.npz    for approximate search of a large index, see `approximate`
    index-part-4.jsonl, index-features-4.npy    the same, of images that an unfinished update has encoded

A .jsonl file names its features and is renamed to its place after them: it is there completely or not at all.
"""

from __future__ import annotations

import mmap
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
from clip_retrieval.jsonl import LONGEST_LINE, open_input, parse_record, read_lines

INDEX = "index.jsonl"
VERSION = 1
CHUNK = 2**24  # bytes of the file to scan at a time
_FEATURES = re.compile(r"index-features-(\d{1,9})\.npy")
_FAISS = re.compile(r"index-faiss-(\d{1,9})\.npz")
_PROBLEM = re.compile(rb'"problem"\s*:')  # within a JSON text, the quotes would be escaped
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


class Readable(Sequence[Entry]):
    """The readable files of an index in the order of the features. A line is parsed, and checked, when it is used.

    To parse a million lines takes ten seconds, and a search shows a few of them.
    """

    def __init__(self, path: Path):
        """Map the file. Raises UserError if it cannot be read."""
        self._path = path
        with open_input(path) as file:
            size = os.fstat(file.fileno()).st_size
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"\n"
        starts = [
            begin + 1 + np.flatnonzero(np.frombuffer(self._content, np.uint8, min(size - begin, CHUNK), begin) == 10)
            for begin in range(0, size, CHUNK)
        ]
        self._starts = np.concatenate([*starts, [size]]).astype(np.int64)  # of the lines after the first
        broken = [match.start() for match in _PROBLEM.finditer(self._content, int(self._starts[0]))]
        is_readable = np.diff(self._starts) > 1
        is_readable[np.searchsorted(self._starts, broken, "right") - 1] = False
        self._lines = np.flatnonzero(is_readable)

    def read_head(self) -> dict[str, Any]:
        """The first line, of the same file even if it is replaced."""
        return self._parse(0, int(self._starts[0]), 1) if self._starts[0] else {}

    def _parse(self, begin: int, end: int, line: int) -> dict[str, Any]:
        try:
            if end - begin > LONGEST_LINE:
                raise ValueError(f"longer than {LONGEST_LINE:,} bytes")
            return parse_record(self._content[begin:end])
        except ValueError as error:
            raise _damaged(self._path, line, error) from None

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        line = int(self._lines[row])
        record = self._parse(int(self._starts[line]), int(self._starts[line + 1]), line + 2)
        try:
            return _parse_entry(record)
        except ValueError as error:
            raise _damaged(self._path, line + 2, error) from None


@dataclass
class OpenIndex:
    """An index to search: the model, the readable files, and their features, float32 (files, dim), memory-mapped."""

    model: dict[str, Any]
    entries: Readable
    features: np.ndarray
    features_path: Path


def open_index(folder: Path, photos: Path) -> OpenIndex:
    """Open a complete index without parsing its lines. Raises UserError if there is none, or it is damaged."""
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{photos} has no index in {folder}; make it: search.py index {photos} --resume CKPT")
    entries = Readable(path)
    features_path, model = _read_head(path, entries.read_head())
    return OpenIndex(model, entries, _map_checked(path, features_path, (len(entries), model["dim"])), features_path)


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
    head: tuple[Path, dict[str, Any]] | None = None
    entries = []
    with open_input(path) as file:
        for line, content in read_lines(file, path):
            try:
                record = parse_record(content)
                if head is None:
                    head = _read_head(path, record)
                else:
                    entries.append(_parse_entry(record))
            except ValueError as error:
                raise _damaged(path, line, error) from None
    features_path, model = head or _read_head(path, {})
    # the features
    is_readable = np.fromiter((entry.problem is None for entry in entries), bool, len(entries))
    _map_checked(path, features_path, (int(is_readable.sum()), model["dim"]))
    return Table(path, model, entries, features_path, np.where(is_readable, is_readable.cumsum() - 1, -1))


def _read_head(path: Path, head: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The file of the features, and the record of the model, from the first line."""
    name, model = head.get("features"), head.get("model")
    if not isinstance(name, str) or not _FEATURES.fullmatch(name) or not isinstance(model, dict):
        raise UserError(f"{path}: not an index of search.py; delete it and index the folder again")
    if head.get("version") != VERSION or not all(isinstance(model.get(key), kind) for key, kind in _MODEL.items()):
        raise UserError(f"{path}: written by another version of search.py; delete it and index the folder again")
    return path.with_name(name), model


def _map_checked(path: Path, features_path: Path, shape: tuple[int, int]) -> np.ndarray:
    """Map the features, float32 of a shape."""
    if not features_path.exists():
        raise UserError(f"{features_path}: missing; delete {path.name}, too, and index the folder again")
    features = read_npy(features_path, memory_map=True)
    if features.dtype != np.float32 or features.shape != shape:
        raise UserError(f"{features_path}: not the features of {path.name}; delete both and index the folder again")
    return features


def _damaged(path: Path, line: int, error: ValueError) -> UserError:
    return UserError(f"{path}, line {line}: {error}; delete the file and index the folder again")


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


def delete_unused(folder: Path, features_path: Path) -> None:
    """Delete the parts of `folder`, and the features that the index does not use, with their FAISS index."""
    used = _FEATURES.fullmatch(features_path.name)
    for path in list(folder.iterdir()):
        match = _FEATURES.fullmatch(path.name) or _FAISS.fullmatch(path.name)
        is_unused = match is not None and used is not None and match[1] != used[1]
        if is_unused or _PART.fullmatch(path.name):
            path.unlink(missing_ok=True)
