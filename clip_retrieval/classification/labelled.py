"""Images that each belong to a class: what a zero-shot classification is scored on."""

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
        name: the data set, e.g. "cifar100", or the name of the folder.
        images: the images, opened when asked for.
        labels: int64 (images,), the class of each image.
        class_names: what the classes are called, (classes,). Two classes may have the same name, and stay two.
        place: the folder that the images were read from, if any.
        names_file: the file that named the classes, if any.
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
            raise ValueError("there is not one label for each image")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.class_names):
            raise ValueError("labels point outside the classes")
        object.__setattr__(self, "labels", labels)
