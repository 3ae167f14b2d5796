"""One split of a data set, ready for a model."""

from __future__ import annotations

from dataclasses import dataclass

from clip_retrieval.data.captions import Tokens
from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.pixels.pixels import Pixels


@dataclass
class Split:
    """A split of a data set, its captions and negative captions tokenized, its images as the model receives them."""

    dataset: RetrievalDataset
    tokens: Tokens
    pixels: Pixels
