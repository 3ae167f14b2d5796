"""Scores of tasks that choose between a few captions or images, in percent.

A tie counts as the expectation over a random choice between the equal items. The authors' code counts it as wrong, or
in ARO's order tasks as right; `ties` is the number of examples that this concerns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_retrieval.evaluation.scores import TIE

MIN_ATTRIBUTES = 25  # ARO counts the pairs of attributes that have at least this many examples


def score_choices(images: Tensor, captions: Tensor, image: np.ndarray, options: np.ndarray) -> tuple[Tensor, Tensor]:
    """Score examples with one image and several captions, the first of which is true.

    Args:
        images, captions: L2-normalised features, (images, dim) and (captions, dim).
        image: image index of each example, (examples,).
        options: caption indices of each example, (examples, captions).

    Returns:
        The probability that the true caption is chosen, float64 (examples,), and whether it ties with another one.
    """
    scores = _scores(images, captions, image[:, None], options)
    gaps = scores[:, 1:] - scores[:, :1]
    tied = (gaps.abs() <= TIE).sum(1)
    is_best = (gaps <= TIE).all(1)
    return is_best / (1.0 + tied.double()), is_best & (tied > 0)


def score_winoground(images: Tensor, captions: Tensor, image: np.ndarray, caption: np.ndarray) -> dict[str, Tensor]:
    """Score examples with two images and two captions, where caption i belongs to image i.

    Args:
        images, captions: L2-normalised features, (images, dim) and (captions, dim).
        image, caption: indices, (examples, 2).

    Returns:
        "text": the probability that the right caption is chosen for both images, float64 (examples,); "image": the
        right image for both captions; "group": both; "ties": whether any of the four choices is a tie.
    """
    scores = _scores(images, captions, image[:, :, None], caption[:, None, :])  # (examples, image, caption)
    right = torch.stack([scores[:, 0, 0], scores[:, 1, 1]], dim=1)
    other_caption = torch.stack([scores[:, 0, 1], scores[:, 1, 0]], dim=1)
    text, image_choice = _chance(right - other_caption), _chance(right - other_caption.flip(1))
    ties = ((text == 0.5) | (image_choice == 0.5)).any(1)
    text, of_image = text.prod(1), image_choice.prod(1)
    return {"text": text, "image": of_image, "group": text * of_image, "ties": ties}


def summarize(values: Tensor, ties: Tensor) -> dict[str, Any]:
    """{"accuracy": percent, "examples": number, "ties": number}."""
    return {"accuracy": 100 * float(values.mean()), "examples": len(values), "ties": int(ties.sum())}


def group_accuracies(values: Tensor, groups: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{group: {"accuracy": percent, "examples": number}}, by name."""
    rows: defaultdict[str, list[int]] = defaultdict(list)  # an array of texts would pad all to the longest
    for row, group in enumerate(groups):
        rows[group].append(row)
    found = {name: values[rows[name]] for name in sorted(rows)}
    return {name: {"accuracy": 100 * float(own.mean()), "examples": len(own)} for name, own in found.items()}


def _scores(images: Tensor, captions: Tensor, image: np.ndarray, caption: np.ndarray) -> Tensor:
    """Float64 cosines of pairs of indices, which broadcast."""
    image, caption = np.broadcast_arrays(image, caption)
    images, captions = images.double().cpu(), captions.double().cpu()
    scores = torch.cat([(images[i] * captions[c]).sum(-1) for i, c in zip(_split(image), _split(caption))])
    return scores.view(image.shape)


def _split(indices: np.ndarray) -> tuple[Tensor, ...]:
    return torch.from_numpy(indices.reshape(-1).astype(np.int64)).split(2**14)


def _chance(gap: Tensor) -> Tensor:
    """1 for a positive gap, 0 for a negative one, one half for a tie."""
    return torch.where(gap.abs() <= TIE, 0.5, (gap > 0).double())
