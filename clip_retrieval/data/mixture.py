"""Several data sets as one train split.

The val and test splits are not mixed: they are those of the first data set that has one, as simple-clip evaluates on
COCO for any training data. The user names the data set for evaluation first.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from clip_retrieval.data.dataset import UNSPLIT, Images, RetrievalDataset
from clip_retrieval.data.negatives import Negatives
from clip_retrieval.errors import UserError, format_counts
from clip_retrieval.log import log
from clip_retrieval.options import DatasetOptions

Read = Callable[[DatasetOptions, str], "RetrievalDataset | None"]


@dataclass(frozen=True)
class Mixture(RetrievalDataset):
    """The concatenated images, captions and pairs of several data sets, without their ids."""

    parts: tuple[RetrievalDataset, ...] = ()


class MixedImages:
    """The concatenated images of several data sets."""

    def __init__(self, parts: Sequence[Images]):
        self.parts = parts
        self._first = _cumulate([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> Image.Image:
        images, own = self.find(index)
        return images[own]

    def name(self, index: int) -> str:
        images, own = self.find(index)
        return images.name(own)

    def find(self, index: int) -> tuple[Images, int]:
        """Find the images of the data set of an image, and its index there."""
        part = bisect_right(self._first, index) - 1
        return self.parts[part], int(index) - self._first[part]


def mix(parts: Sequence[RetrievalDataset], name: str) -> Mixture:
    """Concatenate train splits. The result's split is UNSPLIT if all of theirs are.

    Raises UserError, naming the data set, if one has no pairs.
    """
    for part in parts:
        part.require_pairs()
    first_image = _cumulate([len(part.images) for part in parts])
    first_caption = _cumulate([len(part.captions) for part in parts])
    pairs = [part.pairs + offsets for part, *offsets in zip(parts, first_image, first_caption)]
    return Mixture(
        name=name,
        split=UNSPLIT if all(part.split == UNSPLIT for part in parts) else "train",
        images=MixedImages([part.images for part in parts]),
        captions=[caption for part in parts for caption in part.captions],
        pairs=np.concatenate(pairs),
        negatives=_mix_negatives(parts),
        parts=tuple(parts),
    )


def _mix_negatives(parts: Sequence[RetrievalDataset]) -> Negatives | None:
    if all(part.negatives is None for part in parts):
        return None
    lists = [part.negatives.lists() if part.negatives else [()] * len(part.captions) for part in parts]
    return Negatives.from_lists(itertools.chain(*lists))


def read_mixture(name: str, parts: Sequence[DatasetOptions], split: str, read: Read) -> RetrievalDataset | None:
    """Read the mixture of the train splits, or the val or test split of the first data set that has it.

    A data set without splits is only used for training. If no data set has splits, the first one is scored as it would
    be alone.

    Args:
        name: name of the mixture.
        parts: the options of each data set.
        split: "train", "val" or "test".
        read: reads a split of one data set, None if it has no such split.

    Raises:
        UserError: a data set has no train split, or `read` fails.
    """
    if split != "train":
        return _read_held_out(parts, split, read)
    found = []
    for part in parts:
        if (dataset := read(part, "train")) is None:
            raise UserError(
                f"{part.name} in {part.place} has no train split; remove it from the mixture, or give its train data"
            )
        found.append(dataset)
    for dataset in found:
        log.info(f"  {dataset.name}: {format_counts(image=len(dataset.images), caption=len(dataset.captions))}")
    return mix(found, name)


def _read_held_out(parts: Sequence[DatasetOptions], split: str, read: Read) -> RetrievalDataset | None:
    found = []
    for part in parts:
        dataset = read(part, split)
        if dataset is not None and dataset.split != UNSPLIT and len(dataset.pairs):
            log.info(f"{split} split: from {dataset.name}, the first data set that has one")
            return dataset
        found.append(dataset)
    none_has_splits = all(dataset is not None and dataset.split == UNSPLIT for dataset in found)
    return found[0] if none_has_splits else None


def _cumulate(sizes: Sequence[int]) -> np.ndarray:
    return np.cumsum([0, *sizes])
