"""A split of a Karpathy JSON without its images, for the benchmarks."""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip_retrieval.data.readers.karpathy import read_karpathy_json


class Part(NamedTuple):
    """A split.

    Attributes:
        names: file name of each image.
        texts: all captions.
        pairs: (image index, caption index), int64 (captions, 2).
    """

    names: list[str]
    texts: list[str]
    pairs: np.ndarray


def read_part(path: Path, split: str | None = None) -> Part:
    """Read a split (default: test, or train if there is no test split). Raises UserError."""
    parts = read_karpathy_json(path)
    images = parts[split or ("test" if parts.get("test") else "train")]
    owners = np.repeat(np.arange(len(images)), [len(image.texts) for image in images])
    texts = [text for image in images for text in image.texts]
    return Part([image.name for image in images], texts, np.stack([owners, np.arange(len(texts))], axis=1))
