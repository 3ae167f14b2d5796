"""Features on disk: as JSON lines, which other systems read, or as .npy with ids beside it, which is quick.

    test_imgs.img_feat.jsonl     {"image_id": 1000002, "feature": [0.0198, ...]}
    test_texts.txt_feat.jsonl    {"text_id": 248816, "feature": [0.1314, ...]}

    image_features.npy           float32 (images, dimensions)
    image_ids.json               [1000002, ...]; where there is none, the ids are the rows, from 0
    text_features.npy, text_ids.json
    pairs.npy                    int64 (pairs, 2), text row and image row: what `evaluate_features.py --pairs` takes

Numbers are written with nine digits. That is less than a fifth of the way from a float32 number to where another one
would be nearer, so that they come back bit for bit, also through float64.

The time to read JSON lines is that of Python's own conversion of decimals to floats, some 0.2 us a number (numpy's
fromstring takes as long); large files are shared between processes.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from clip_retrieval.errors import NotFiniteError, UserError
from clip_retrieval.files import to_json, write_atomic
from clip_retrieval.jsonl import (
    LONGEST_LINE,
    Id,
    get_id,
    is_id,
    open_input,
    parse_record_of_numbers,
    read_lines,
    write_lines,
)

ID_KEYS = {"image": "image_id", "text": "text_id"}
NPY = ".npy"
READ_BYTES = 2**26  # bytes of JSON that a process reads at a time


@dataclass(frozen=True)
class FeatureFile:
    """The features of one side.

    Attributes:
        ids: what the items are called, all different.
        vectors: floats (items, dimensions).
        path: the file they are from.
    """

    ids: Sequence[Id]
    vectors: np.ndarray
    path: Path

    def name(self, row: int) -> str:
        """An item in words, for messages."""
        return f"{self.ids[row]} in {self.path}"


def write_features(path: Path, kind: str, ids: Sequence[Id], vectors: np.ndarray) -> None:
    """Write the float32 (items, dim) features of "image"s or "text"s: .npy by its name, else JSON lines.

    Raises UserError for a feature that is not finite, and where the place cannot be written.
    """
    wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(wrong):
        raise NotFiniteError(f"{ID_KEYS[kind]} {ids[wrong[0]]}: feature is not finite; it is not written to {path}")
    if path.suffix != NPY:
        write_lines(path, _json_lines(ID_KEYS[kind], ids, vectors))
        return
    write_ids(ids_path(path), ids)
    write_array(path, vectors)


def _json_lines(key: str, ids: Sequence[Id], vectors: np.ndarray) -> Iterator[str]:
    form = ", ".join(["%.9g"] * vectors.shape[1]) + ","
    for item, vector in zip(ids, vectors, strict=True):
        numbers = (form % tuple(vector.tolist())).replace("-0,", "-0.0,")  # JSON's -0 is a whole number without sign
        yield f'{{"{key}": {json.dumps(item)}, "feature": [{numbers[:-1]}]}}'


def write_array(path: Path, content: np.ndarray) -> None:
    """Write a .npy file."""
    with write_atomic(path) as file:
        np.save(file, content, allow_pickle=False)


def write_ids(path: Path, ids: Sequence[Id]) -> None:
    """Write a JSON list, an id on each line."""
    with write_atomic(path) as file:
        file.write(b"[\n" + b",\n".join(map(to_json, ids)) + b"\n]\n")


def ids_path(path: Path) -> Path:
    """Where the ids of a .npy file of features are: image_ids.json beside image_features.npy."""
    return path.with_name(f"{path.stem.removesuffix('_features')}_ids.json")


def read_features(path: Path, kind: str, *, memory_map: bool = False) -> FeatureFile:
    """Read the features of "image"s or "text"s, .npy by its name, else JSON lines (as float32).

    memory_map: leave those of a .npy on disk. Raises UserError, naming file and line, where it is something else.
    """
    features = _read_npy(path, memory_map) if path.suffix == NPY else _read_jsonl(path, ID_KEYS[kind])
    first: dict[Id, int] = {}
    for row, item in enumerate(features.ids):
        if first.setdefault(item, row) != row:
            raise UserError(
                f"{path}: {ID_KEYS[kind]} {item!r} stands there twice, as items {first[item] + 1} and {row + 1}; ids "
                "must differ"
            )
    return features


def _read_npy(path: Path, memory_map: bool) -> FeatureFile:
    from clip_retrieval.files import read_json
    from clip_retrieval.retrieval.evaluate_features import read_vectors

    vectors = read_vectors(path, memory_map=memory_map)
    beside = ids_path(path)
    if not beside.exists():
        return FeatureFile(range(len(vectors)), vectors, path)
    ids = read_json(beside)
    if not isinstance(ids, list) or not all(map(is_id, ids)):
        raise UserError(f"{beside}: not a JSON list of ids, whole numbers or texts")
    if len(ids) != len(vectors):
        raise UserError(f"{beside} has {len(ids):,} ids, and {path} {len(vectors):,} features; both must be of one run")
    return FeatureFile(ids, vectors, path)


def _read_jsonl(path: Path, key: str) -> FeatureFile:
    dim, parts = _first_length(path, key), _parts(path)
    workers = min(len(parts), _cores())
    requests = [(path, key, dim, *part) for part in parts]
    if workers == 1:
        read = list(map(_read_part, requests))
    else:
        # Not forked: the threads of torch would not be there in the copy.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            read = list(pool.map(_read_part, requests))
    lines = 0
    for part in read:
        if part.error is not None:
            raise UserError(f"{path}, line {lines + part.lines}: {part.error}")
        lines += part.lines
    vectors = np.concatenate([np.frombuffer(part.numbers, np.float32).reshape(-1, dim) for part in read])
    return FeatureFile([item for part in read for item in part.ids], vectors, path)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first_length(path: Path, key: str) -> int:
    """How many numbers the first feature has."""
    with open_input(path) as file:
        for number, line in read_lines(file, path):
            try:
                return len(_item(line, key)[1])
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
    raise UserError(f"{path}: holds no features")


def _parts(path: Path) -> list[tuple[int, int]]:
    """Ranges of bytes that begin and end with a line."""
    with open_input(path) as file:
        size = file.seek(0, os.SEEK_END)
        bounds = [0]
        while bounds[-1] + READ_BYTES < size:
            file.seek(bounds[-1] + READ_BYTES)
            file.readline()
            bounds.append(file.tell())
        return list(zip(bounds, [*bounds[1:], size]))


@dataclass
class _Part:
    """What a range of a file holds, up to the first error; `lines` counts the line with the error as well."""

    ids: list[Id]
    numbers: array
    lines: int
    error: str | None


def _read_part(request: tuple[Path, str, int, int, int]) -> _Part:
    path, key, dim, begin, end = request
    part = _Part([], array("f"), 0, None)
    with open_input(path) as file:
        file.seek(begin)
        while begin < end and (line := file.readline(LONGEST_LINE + 1)):
            begin += len(line)
            part.lines += 1
            if line.isspace():
                continue
            try:
                if len(line) > LONGEST_LINE:
                    raise ValueError(f"longer than {LONGEST_LINE:,} bytes; write one record a line")
                item, feature = _item(line, key)
                if len(feature) != dim:
                    raise ValueError(f"a feature of {len(feature)} numbers, where the first has {dim}")
                part.numbers.extend(feature)
            except (ValueError, TypeError, OverflowError) as error:
                reason = error if type(error) is ValueError else '"feature" is not a list of numbers'
                return _Part([], array("f"), part.lines, str(reason))
            part.ids.append(item)
    return part


def _item(line: bytes, key: str) -> tuple[Id, list[float]]:
    content = parse_record_of_numbers(line, key)
    item, feature = get_id(content, key), content.get("feature")
    if not isinstance(feature, list) or not feature:
        raise ValueError('no "feature" that is a list of numbers')
    return item, feature
