"""Features on disk: JSON lines, which other systems read, or .npy with an ids file, which is faster.

    test_imgs.img_feat.jsonl     {"image_id": 1000002, "feature": [0.0198, ...]}
    test_texts.txt_feat.jsonl    {"text_id": 248816, "feature": [0.1314, ...]}

    image_features.npy           float32 (images, dimensions)
    image_ids.json               [1000002, ...]; if missing, the ids are the rows, from 0
    text_features.npy, text_ids.json
    pairs.npy                    int64 (pairs, 2), text row and image row, for `evaluate_features.py --pairs`

JSON numbers have nine significant digits: enough to restore every float32 bit for bit, even if parsed as float64.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clip_retrieval.errors import NotFiniteError, UserError, format_counts
from clip_retrieval.files import to_json, write_atomic
from clip_retrieval.jsonl import Id, get_id, is_id, open_input, parse_record_of_numbers, read_lines, write_lines

ID_KEYS = {"image": "image_id", "text": "text_id"}
NPY = ".npy"


@dataclass(frozen=True)
class FeatureFile:
    """The features of images or texts.

    Attributes:
        ids: unique ids of the items.
        vectors: floats (items, dimensions).
        path: the file that was read.
    """

    ids: Sequence[Id]
    vectors: np.ndarray
    path: Path

    def name(self, row: int) -> str:
        """Name of an item in messages."""
        return f"{self.ids[row]} in {self.path}"


def write_features(path: Path, kind: str, ids: Sequence[Id], vectors: np.ndarray) -> None:
    """Write float32 (items, dim) features of a kind ("image" or "text"): .npy if the path ends in it, else JSON lines.

    Raises NotFiniteError for a feature that is not finite, OSError if the path cannot be written.
    """
    invalid = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(invalid):
        raise NotFiniteError(f"{ID_KEYS[kind]} {ids[invalid[0]]}: feature is not finite; {path} is not written")
    if path.suffix != NPY:
        write_lines(path, _format_lines(ID_KEYS[kind], ids, vectors))
        return
    write_ids(ids_path(path), ids)
    write_array(path, vectors)


def _format_lines(key: str, ids: Sequence[Id], vectors: np.ndarray) -> Iterator[str]:
    form = ", ".join(["%.9g"] * vectors.shape[1]) + ","
    for item, vector in zip(ids, vectors, strict=True):
        numbers = (form % tuple(vector.tolist())).replace("-0,", "-0.0,")  # JSON's -0 is an integer, which has no sign
        yield f'{{"{key}": {json.dumps(item)}, "feature": [{numbers[:-1]}]}}'


def write_array(path: Path, content: np.ndarray) -> None:
    """Write a .npy file."""
    with write_atomic(path) as file:
        np.save(file, content, allow_pickle=False)


def write_ids(path: Path, ids: Sequence[Id]) -> None:
    """Write a JSON list with one id per line."""
    with write_atomic(path) as file:
        file.write(b"[\n" + b",\n".join(map(to_json, ids)) + b"\n]\n")


def ids_path(path: Path) -> Path:
    """The ids file of a .npy file: image_ids.json for image_features.npy."""
    return path.with_name(f"{path.stem.removesuffix('_features')}_ids.json")


def read_features(path: Path, kind: str, *, memory_map: bool = False) -> FeatureFile:
    """Read the features of a kind ("image" or "text"): .npy if the path ends in it, else JSON lines (as float32).

    memory_map: leave the features of a .npy on disk. Raises UserError, naming file and line, for anything else.
    """
    features = _read_npy(path, memory_map) if path.suffix == NPY else _read_jsonl(path, ID_KEYS[kind])
    first: dict[Id, int] = {}
    for row, item in enumerate(features.ids):
        if first.setdefault(item, row) != row:
            raise UserError(
                f"{path}: {ID_KEYS[kind]} {item!r} is there twice, as items {first[item] + 1} and {row + 1}; ids must "
                "be unique"
            )
    return features


def _read_npy(path: Path, memory_map: bool) -> FeatureFile:
    from clip_retrieval.files import read_json
    from clip_retrieval.retrieval.evaluate_features import read_vectors

    vectors = read_vectors(path, memory_map=memory_map)
    ids_file = ids_path(path)
    if not ids_file.exists():
        return FeatureFile(range(len(vectors)), vectors, path)
    ids = read_json(ids_file)
    if not isinstance(ids, list) or not all(map(is_id, ids)):
        raise UserError(f"{ids_file}: not a JSON list of ids, which are whole numbers or texts")
    if len(ids) != len(vectors):
        raise UserError(
            f"{ids_file}: has {format_counts(id=len(ids))}, but {path} has {format_counts(feature=len(vectors))}; give "
            "files of one run"
        )
    return FeatureFile(ids, vectors, path)


def _read_jsonl(path: Path, key: str) -> FeatureFile:
    ids: list[Id] = []
    numbers, dim = array("f"), 0
    with open_input(path) as file:
        for number, line in read_lines(file, path):
            try:
                content = parse_record_of_numbers(line, key)
                item, feature = get_id(content, key), content.get("feature")
                if not isinstance(feature, list) or not feature:
                    raise ValueError('no "feature" that is a list of numbers')
                dim = dim or len(feature)
                if len(feature) != dim:
                    raise ValueError(f"a feature of {len(feature)} numbers, but the first one has {dim}")
                numbers.extend(feature)
            except (ValueError, TypeError, OverflowError) as error:
                reason = error if type(error) is ValueError else '"feature" is not a list of numbers'
                raise UserError(f"{path}, line {number}: {reason}") from None
            ids.append(item)
    if not ids:
        raise UserError(f"{path}: holds no features")
    return FeatureFile(ids, np.frombuffer(numbers, np.float32).reshape(-1, dim), path)
