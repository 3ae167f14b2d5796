"""Anybody's embeddings, read from .npy files and scored: the numbers of `scripts/evaluate_features.py`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from clip_retrieval.arrays import read_npy
from clip_retrieval.device import choose_device
from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.metrics import STANDARD_K, report
from clip_retrieval.evaluation.ranks import retrieval_ranks


def evaluate_feature_files(
    image_features: Path,
    text_features: Path,
    *,
    text_to_image: Path | None = None,
    pairs: Path | None = None,
    normalize: bool = False,
    recall_k: Iterable[int] = STANDARD_K,
    device: str | None = None,
) -> dict[str, Any]:
    """Scores the inner products of two .npy files, (images, dim) and (captions, dim).

    text_to_image holds the image row of each text, (captions,). pairs holds (text row, image row), (P, 2), for
    many-to-many, and decides if both are given. normalize divides each feature by its length first, in float64.
    device: where to compute (default: the best there is).

    Returns {"images", "captions", "i2t", "t2i", "mean_recall", "rsum"}.
    Raises UserError for a file that cannot be read or does not fit the others.
    """
    images, texts = read_vectors(image_features), read_vectors(text_features)
    if images.shape[1] != texts.shape[1]:
        raise UserError(
            f"{image_features} has {images.shape[1]} dimensions and {text_features} has {texts.shape[1]}: "
            "both must come from one model"
        )
    relevant = _relevance(text_to_image, pairs, len(images), len(texts))
    if normalize:
        images, texts = _normalized(images, image_features), _normalized(texts, text_features)
    ranks = retrieval_ranks(
        images,
        texts,
        relevant,
        device=choose_device(device),
        image_name=lambda row: f"row {row} of {image_features}",
        text_name=lambda row: f"row {row} of {text_features}",
    )
    return {"images": len(images), "captions": len(texts), **report(*ranks, recall_k)}


def _relevance(text_to_image: Path | None, pairs: Path | None, images: int, texts: int) -> np.ndarray:
    """The relevant (image row, text row), (P, 2): the columns of the pairs file the other way round."""
    if pairs is not None:
        rows = _indices(pairs)
        if rows.ndim != 2 or rows.shape[1] != 2 or len(rows) == 0:
            raise UserError(f"{pairs} has shape {rows.shape}: expected (pairs, 2), rows of text row, image row")
        _check_range(pairs, rows[:, 0], texts, "text")
    elif text_to_image is not None:
        image = _indices(text_to_image)
        if image.shape != (texts,):
            raise UserError(f"{text_to_image} has shape {image.shape}: expected ({texts},), one image row per text")
        rows = np.stack([np.arange(texts), image], axis=1)
    else:
        raise UserError("which text belongs to which image is missing: give --text_to_image M.npy or --pairs P.npy")
    _check_range(pairs or text_to_image, rows[:, 1], images, "image")
    return rows[:, ::-1].astype(np.int64)


def _check_range(path: Path, rows: np.ndarray, count: int, kind: str) -> None:
    wrong = np.flatnonzero((rows < 0) | (rows >= count))
    if len(wrong):
        raise UserError(
            f"{path}: row {wrong[0]} names {kind} row {rows[wrong[0]]}, but there are {count} (0 to {count - 1})"
        )


def read_vectors(path: Path, *, memory_map: bool = False) -> np.ndarray:
    """The floats (items, dimensions) of a .npy file; with memory_map they stay on disk.

    Raises UserError if it is something else.
    """
    features = read_npy(path, memory_map=memory_map)
    if features.ndim != 2 or 0 in features.shape:
        raise UserError(f"{path} has shape {features.shape}: expected (items, dimensions), none of them 0")
    if features.dtype.kind != "f":
        raise UserError(f"{path} holds {features.dtype}: expected floating-point features")
    return features


def _indices(path: Path) -> np.ndarray:
    rows = read_npy(path)
    if rows.dtype.kind not in "iu":
        raise UserError(f"{path} holds {rows.dtype}: expected integer rows")
    return rows


def _normalized(features: np.ndarray, path: Path) -> np.ndarray:
    """Each row divided by its length, in float64."""
    features = features.astype(np.float64)
    # A power of two (exact) keeps the squares of very large and very small numbers within range.
    with np.errstate(invalid="ignore"):  # what is not finite stays so, and is named when it is scored
        largest = np.abs(features).max(axis=1)
        features = np.ldexp(features, -np.frexp(largest)[1][:, None])
        norms = np.linalg.norm(features, axis=1)
        if len(zero := np.flatnonzero(norms == 0)):
            raise UserError(f"{path}: row {zero[0]} has length 0 and cannot be normalized; leave it out")
        return features / norms[:, None]
