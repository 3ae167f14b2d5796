"""Score the embeddings of any system: arrays, or .npy files for `scripts/evaluate_features.py`."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip_retrieval.arrays import read_npy
from clip_retrieval.device import choose_device
from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.metrics import STANDARD_K, report
from clip_retrieval.evaluation.ranks import retrieval_ranks


def evaluate_features(
    image_features: torch.Tensor | np.ndarray,
    text_features: torch.Tensor | np.ndarray,
    pairs: torch.Tensor | np.ndarray | None = None,
    *,
    text_to_image: torch.Tensor | np.ndarray | None = None,
    recall_k: Iterable[int] = STANDARD_K,
    device: torch.device | str | None = None,
    image_name: Callable[[int], str] = str,
    text_name: Callable[[int], str] = str,
) -> dict[str, Any]:
    """Score the inner products of features, as given: for cosines, normalise them first.

    Args:
        image_features: floats (images, dim).
        text_features: floats (texts, dim).
        pairs: relevant (image index, text index), integers (P, 2), many-to-many.
        text_to_image: instead of `pairs`, the image index of each text, integers (texts,).
        recall_k: further K besides 1, 5 and 10.
        device: where to compute (default: the device of image_features).
        image_name, text_name: name of an item in error messages.

    Returns {"images", "captions", "i2t": {"R@1", ..., "MedR", "MeanR"}, "t2i": {...}, "mean_recall", "rsum"}, recall in
    percent. Raises UserError for shapes that do not match, indices out of range, and features that are not finite.
    """
    if (pairs is None) == (text_to_image is None):
        raise TypeError("give either pairs or text_to_image")
    if pairs is None:
        image = np.asarray(torch.as_tensor(text_to_image).cpu())
        if image.shape != (len(text_features),):
            raise UserError(f"text_to_image has shape {image.shape}; expected ({len(text_features)},), one per text")
        pairs = np.stack([image, np.arange(len(image))], axis=1)
    ranks = retrieval_ranks(
        image_features, text_features, pairs, device=device, image_name=image_name, text_name=text_name
    )
    return {"images": len(image_features), "captions": len(text_features), **report(*ranks, recall_k)}


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
    """Score the inner products of two .npy files.

    Args:
        image_features: floats (images, dim).
        text_features: floats (captions, dim).
        text_to_image: the image row of each text, (captions,).
        pairs: relevant (text row, image row), (P, 2), many-to-many; takes precedence over text_to_image.
        normalize: first divide each feature by its length, in float64.
        recall_k: further K besides 1, 5 and 10.
        device: where to compute (default: the best available).

    Returns {"images", "captions", "i2t", "t2i", "mean_recall", "rsum"}.
    Raises UserError if a file cannot be read or does not match the others.
    """
    # read and check the arrays
    images, texts = read_vectors(image_features), read_vectors(text_features)
    if images.shape[1] != texts.shape[1]:
        raise UserError(
            f"{image_features}: has {images.shape[1]} dimensions, but {text_features} has {texts.shape[1]}; give "
            "features of one model"
        )
    relevant = _read_pairs(text_to_image, pairs, len(images), len(texts))
    if normalize:
        images, texts = _normalize(images, image_features), _normalize(texts, text_features)
    return evaluate_features(
        images,
        texts,
        relevant,
        recall_k=recall_k,
        device=choose_device(device),
        image_name=lambda row: f"row {row} of {image_features}",
        text_name=lambda row: f"row {row} of {text_features}",
    )


def _read_pairs(text_to_image: Path | None, pairs: Path | None, images: int, texts: int) -> np.ndarray:
    """The relevant (image row, text row), int64 (P, 2): the columns of the pairs file are swapped."""
    if pairs is not None:
        source, rows = pairs, _read_integers(pairs)
        if rows.ndim != 2 or rows.shape[1] != 2 or len(rows) == 0:
            raise UserError(f"{pairs}: has shape {rows.shape}; expected (pairs, 2), rows of text row, image row")
        _check_range(pairs, rows[:, 0], texts, "text")
    elif text_to_image is not None:
        source, image = text_to_image, _read_integers(text_to_image)
        if image.shape != (texts,):
            raise UserError(f"{text_to_image}: has shape {image.shape}; expected ({texts},), one image row per text")
        rows = np.stack([np.arange(texts), image], axis=1)
    else:
        raise UserError("the relevant pairs are missing; give --text_to_image M.npy or --pairs P.npy")
    _check_range(source, rows[:, 1], images, "image")
    return rows[:, ::-1].astype(np.int64)


def _check_range(path: Path, rows: np.ndarray, count: int, kind: str) -> None:
    invalid = np.flatnonzero((rows < 0) | (rows >= count))
    if len(invalid):
        raise UserError(
            f"{path}: row {invalid[0]} names {kind} row {rows[invalid[0]]}, but there are {count} (0 to {count - 1})"
        )


def read_vectors(path: Path, *, memory_map: bool = False) -> np.ndarray:
    """Read the floats (items, dimensions) of a .npy file; with memory_map they stay on disk.

    Raises UserError for anything else.
    """
    features = read_npy(path, memory_map=memory_map)
    if features.ndim != 2 or 0 in features.shape:
        raise UserError(f"{path}: has shape {features.shape}; expected (items, dimensions), none of them 0")
    if features.dtype.kind != "f":
        raise UserError(f"{path}: holds {features.dtype}; expected floating-point features")
    return features


def _read_integers(path: Path) -> np.ndarray:
    rows = read_npy(path)
    if rows.dtype.kind not in "iu":
        raise UserError(f"{path}: holds {rows.dtype}; expected integer rows")
    return rows


def _normalize(features: np.ndarray, path: Path) -> np.ndarray:
    """Divide each row by its length, in float64."""
    features = features.astype(np.float64)
    # Scaling by a power of two (exact) keeps the squares of very large and very small numbers within range.
    with np.errstate(invalid="ignore"):  # non-finite values stay, and scoring names them
        largest = np.abs(features).max(axis=1)
        features = np.ldexp(features, -np.frexp(largest)[1][:, None])
        norms = np.linalg.norm(features, axis=1)
        if len(zero := np.flatnonzero(norms == 0)):
            raise UserError(f"{path}: row {zero[0]} has length 0 and cannot be normalized; remove it")
        return features / norms[:, None]
