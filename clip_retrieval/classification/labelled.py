"""Labelled images, for zero-shot classification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clip_retrieval.data.dataset import Images


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes.

    Attributes:
        name: name of the data set or of the folder, e.g. "cifar100".
        images: the images, opened on access.
        labels: int64 (images,), the class of each image.
        class_names: (classes,). Classes with the same name stay separate.
        place: folder of the images, if any.
        names_file: file of the class names, if any.
    """

    name: str
    images: Images
    labels: np.ndarray
    class_names: Sequence[str]
    place: Path | None = None
    names_file: Path | None = None

    def __post_init__(self) -> None:
        labels = np.asarray(self.labels, dtype=np.int64)
        if labels.shape != (len(self.images),):
            raise ValueError(f"labels: expected one label for each of {len(self.images)} images")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.class_names):
            raise ValueError(f"labels: outside the range of {len(self.class_names)} classes")
        object.__setattr__(self, "labels", labels)
