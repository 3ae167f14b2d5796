"""Several data sets as one to train on.

What is scored is no mixture: val and test are those of the first data set that holds such a split out, as simple-clip
scores a model on COCO's whatever it learns from. Name the one to be compared on first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from clip_retrieval.data.dataset import UNSPLIT, Images, RetrievalDataset
from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.options import DataOptions

Read = Callable[[DataOptions, str], "RetrievalDataset | None"]


@dataclass(frozen=True)
class Mixture(RetrievalDataset):
    """The images, captions and pairs of several data sets, one after the other. The ids they have are not kept.

    Attributes:
        parts: the data sets, in their order. Without a common beginning: image 0 of the second is not image 0 here.
    """

    parts: tuple[RetrievalDataset, ...] = ()

    @cached_property
    def first_image(self) -> np.ndarray:
        """int64 (parts + 1,): the images of part i are first_image[i] to first_image[i + 1]."""
        return _bounds([len(part.images) for part in self.parts])


class MixedImages:
    """The images of several data sets, one after the other, each read by its own."""

    def __init__(self, parts: Sequence[Images]):
        self.parts = parts
        self._first = _bounds([len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> Image.Image:
        images, own = self.find(index)
        return images[own]

    def name(self, index: int) -> str:
        images, own = self.find(index)
        return images.name(own)

    def find(self, index: int) -> tuple[Images, int]:
        """The images of the data set that holds an image, and its index there."""
        part = bisect_right(self._first, index) - 1
        return self.parts[part], int(index) - self._first[part]


def mix(parts: Sequence[RetrievalDataset], name: str) -> Mixture:
    """Train splits as one. Its split is UNSPLIT where none of them holds anything out.

    Raises UserError, naming it, where no image of one has a caption.
    """
    for part in parts:
        part.require_pairs()
    first_image = _bounds([len(part.images) for part in parts])
    first_caption = _bounds([len(part.captions) for part in parts])
    pairs = [part.pairs + offsets for part, *offsets in zip(parts, first_image, first_caption)]
    return Mixture(
        name=name,
        split=UNSPLIT if all(part.split == UNSPLIT for part in parts) else "train",
        images=MixedImages([part.images for part in parts]),
        captions=[caption for part in parts for caption in part.captions],
        pairs=np.concatenate(pairs),
        parts=tuple(parts),
    )


def read_mixture(name: str, parts: Sequence[DataOptions], split: str, read: Read) -> RetrievalDataset | None:
    """The train splits as one; of "val" or "test", that of the first data set with such a split.

    A data set without splits is all to train on and holds nothing out. A mixture of nothing but such ones is scored as
    the first of them would be.

    Args:
        name: what the mixture is called.
        parts: the options of each data set.
        split: "train", "val" or "test".
        read: reads a split of one data set, None where there is none.

    Raises:
        UserError: a data set has no train split, or `read` fails.
    """
    if split != "train":
        return _read_held_out(parts, split, read)
    found = [_read_train_split(part, read) for part in parts]
    for dataset in found:
        log.info(f"  {dataset.name}: {len(dataset.images):,} images, {len(dataset.captions):,} captions")
    return mix(found, name)


def _read_train_split(part: DataOptions, read: Read) -> RetrievalDataset:
    dataset = read(part, "train")
    if dataset is None:
        raise UserError(
            f"{part.name} in {part.place} has no train split; take it out of the mixture, or give its data to train on"
        )
    return dataset


def _read_held_out(parts: Sequence[DataOptions], split: str, read: Read) -> RetrievalDataset | None:
    found = []
    for part in parts:
        dataset = read(part, split)
        if dataset is not None and dataset.split != UNSPLIT and len(dataset.pairs):
            log.info(f"{split}: that of {dataset.name}, the first of the data sets that has one")
            return dataset
        found.append(dataset)
    whole = all(dataset is not None and dataset.split == UNSPLIT for dataset in found)
    return found[0] if whole else None


def _bounds(sizes: Sequence[int]) -> np.ndarray:
    return np.cumsum([0, *sizes])
