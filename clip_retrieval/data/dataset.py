"""The one type every reader makes and everything else takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from clip_retrieval.errors import UserError

UNSPLIT = "all"  # the split of a data set that has none: all of it is to train on, and all of it is what --eval scores


class Images(Protocol):
    """Images by index, opened when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Image.Image:
        """The image as RGB. Raises UserError, naming it, where it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """What an image is called in messages: its path, or its id."""
        ...


class StoredImages(Images, Protocol):
    """Images in files, of which can be told whether they have changed."""

    def stamp(self, index: int) -> tuple[int, int]:
        """Size in bytes and time of the last change (ns): they differ where the content does."""
        ...


@runtime_checkable
class EncodedImages(Images, Protocol):
    """Images that are files, or stand in one as they are in a file."""

    def encoded(self, index: int) -> bytes:
        """The bytes of the image file."""
        ...


@dataclass(frozen=True)
class RetrievalDataset:
    """Images, captions, and which belong together.

    Attributes:
        name: the data set, e.g. "coco".
        split: "train", "val" or "test", or UNSPLIT.
        images: the images, opened when asked for.
        captions: the captions.
        pairs: int64 (pairs, 2): (image index, caption index) of every caption that describes an image.
            Many-to-many. Kept unique and sorted by image, then caption. There are none where nobody has said which
            belong together: such a split can be encoded, but not trained on or scored.
        image_ids: what the data set calls the images, where it has names for them that results should carry.
        text_ids: the same for the captions.
    """

    name: str
    split: str
    images: Images
    captions: Sequence[str]
    pairs: np.ndarray
    image_ids: Sequence[int | str] | None = None
    text_ids: Sequence[int | str] | None = None

    def __post_init__(self) -> None:
        pairs = np.asarray(self.pairs, dtype=np.int64).reshape(-1, 2)
        sizes = (len(self.images), len(self.captions))
        if len(pairs) and (pairs.min() < 0 or (pairs.max(axis=0) >= sizes).any()):
            raise ValueError("pairs point outside the images or captions")
        for ids, size in zip((self.image_ids, self.text_ids), sizes):
            if ids is not None and len(ids) != size:
                raise ValueError("there is not one id for each image and caption")
        keys = np.unique(pairs[:, 0] * len(self.captions) + pairs[:, 1])
        pairs = np.stack(np.divmod(keys, len(self.captions)), axis=1)
        object.__setattr__(self, "pairs", pairs)

    def require_pairs(self) -> None:
        """Raise UserError where there is nothing to train on or to score."""
        if len(self.pairs) == 0:
            raise UserError(f"{self.name}, {self.split} split: no image has a caption")

    @cached_property
    def first_pair(self) -> np.ndarray:
        """int64 (images + 1,): the pairs of image i are rows first_pair[i] to first_pair[i + 1] of `pairs`."""
        return np.searchsorted(self.pairs[:, 0], np.arange(len(self.images) + 1))

    def positives(self, images: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """Which captions describe which images, within a batch.

        Args:
            images: int (n,) image indices, repeats allowed.
            captions: int (m,) caption indices, repeats allowed.

        Returns:
            int64 (P, 2): positions in `images` and in `captions` of each pair that belongs together.
        """
        first = self.first_pair
        count = first[images + 1] - first[images]
        rows = np.repeat(np.arange(len(images)), count)
        # The captions of each batch image, one after the other.
        position = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        described = self.pairs[np.repeat(first[images], count) + position, 1]
        order = np.argsort(captions, kind="stable")
        begin = np.searchsorted(captions, described, "left", sorter=order)
        repeats = np.searchsorted(captions, described, "right", sorter=order) - begin
        # A caption that stands several times in the batch is found at each of its places.
        rows = np.repeat(rows, repeats)
        place = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        return np.stack([rows, order[np.repeat(begin, repeats) + place]], axis=1)


# What the splits are called in files.
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
