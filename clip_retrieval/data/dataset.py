"""RetrievalDataset, the type that readers return and the rest of the package takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from clip_retrieval.data.negatives import Negatives
from clip_retrieval.errors import UserError, format_counts

UNSPLIT = "all"  # split of a data set without splits: all of it is the train split, and the test split for --eval


class Images(Protocol):
    """Images by index, opened on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Image.Image:
        """The image as RGB. Raises UserError, naming it, if it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """The name of an image in messages: its path, or its id."""
        ...


@runtime_checkable
class StoredImages(Images, Protocol):
    """Images in files, with stamps that change when the files do."""

    def stamp(self, index: int) -> tuple[int, int]:
        """Size in bytes and time of the last change (ns); they differ if the content does."""
        ...


@runtime_checkable
class EncodedImages(Images, Protocol):
    """Images that are stored as image files, or as their bytes in another file."""

    def encoded(self, index: int) -> bytes:
        """The bytes of the image file."""
        ...


@runtime_checkable
class KeyedImages(Images, Protocol):
    """Images with names that do not depend on the place of the data set."""

    def key(self, index: int) -> str:
        """The name of an image within its data set."""
        ...


@dataclass(frozen=True)
class RetrievalDataset:
    """Images, captions, and the pairs of them that match.

    Attributes:
        name: the data set, e.g. "coco".
        split: "train", "val" or "test", or UNSPLIT.
        images: the images, opened on access.
        captions: the captions.
        pairs: int64 (pairs, 2): (image index, caption index) of every caption that describes an image.
            Many-to-many, unique, and sorted by image, then caption. Without pairs, a split can be encoded, but not
            used for training or scored.
        image_ids: the data set's ids of the images, for results (COCO's image ids); None if it has none.
        text_ids: the same for the captions (COCO's annotation ids, Karpathy's sentids).
        negatives: negative captions, for training; None without them.
    """

    name: str
    split: str
    images: Images
    captions: Sequence[str]
    pairs: np.ndarray
    image_ids: Sequence[int | str] | None = None
    text_ids: Sequence[int | str] | None = None
    negatives: Negatives | None = None

    def __post_init__(self) -> None:
        pairs = np.asarray(self.pairs, dtype=np.int64).reshape(-1, 2)
        sizes = (len(self.images), len(self.captions))
        if len(pairs) and (pairs.min() < 0 or (pairs.max(axis=0) >= sizes).any()):
            raise ValueError("pairs hold indices outside the images or captions")
        for ids, size in zip((self.image_ids, self.text_ids), sizes):
            if ids is not None and len(ids) != size:
                raise ValueError("needs one id for each image and caption")
        keys = np.unique(pairs[:, 0] * len(self.captions) + pairs[:, 1])
        pairs = np.stack(np.divmod(keys, len(self.captions)), axis=1)
        object.__setattr__(self, "pairs", pairs)

    def describe(self) -> str:
        """Describe the split for the log: `coco test: 5,000 images, 25,010 captions`."""
        negatives = f", {len(self.negatives.texts):,} negative captions" if self.negatives else ""
        counts = format_counts(image=len(self.images), caption=len(self.captions))
        return f"{self.name} {self.split}: {counts}{negatives}"

    @property
    def texts(self) -> Sequence[str]:
        """The captions, then the negative captions."""
        return self.captions if self.negatives is None else [*self.captions, *self.negatives.texts]

    def caption_name(self, index: int) -> str:
        """The id of a caption, or its index if the data set has no ids."""
        return str(index if self.text_ids is None else self.text_ids[index])

    @property
    def parts(self) -> tuple[RetrievalDataset, ...]:
        """The data sets of a mixture, in order; their own indices begin at 0. Any other data set is its only part."""
        return (self,)

    @cached_property
    def first_image(self) -> np.ndarray:
        """int64 (parts + 1,): part i has the images first_image[i] to first_image[i + 1] - 1."""
        return np.cumsum([0, *(len(part.images) for part in self.parts)])

    def require_pairs(self) -> None:
        """Raise UserError if there are no pairs, so that the split cannot be used for training or scored."""
        if len(self.pairs) == 0:
            raise UserError(f"{self.name}, {self.split} split: no image has a caption")

    @cached_property
    def first_pair(self) -> np.ndarray:
        """int64 (images + 1,): the pairs of image i are rows first_pair[i] to first_pair[i + 1] of `pairs`."""
        return np.searchsorted(self.pairs[:, 0], np.arange(len(self.images) + 1))

    def captions_of(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """List the captions of each of these images: their positions in `images` and the captions, int64 (n,) each."""
        first = self.first_pair
        count = first[images + 1] - first[images]
        position = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return np.repeat(np.arange(len(images)), count), self.pairs[np.repeat(first[images], count) + position, 1]

    def positives(self, images: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """Find the pairs within a batch.

        Args:
            images: int (n,) image indices, repeats allowed.
            captions: int (m,) caption indices, repeats allowed.

        Returns:
            int64 (P, 2): positions in `images` and in `captions` of each pair.
        """
        # find the captions of the images in the batch; one that the batch repeats is found at each of its positions
        rows, candidates = self.captions_of(images)
        order = np.argsort(captions, kind="stable")
        begin = np.searchsorted(captions, candidates, "left", sorter=order)
        repeats = np.searchsorted(captions, candidates, "right", sorter=order) - begin
        rows = np.repeat(rows, repeats)
        offset = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        return np.stack([rows, order[np.repeat(begin, repeats) + offset]], axis=1)


# The names of splits in files.
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
