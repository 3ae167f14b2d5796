"""Parts of a data set: captions and images that are left out, and images that are held out for val and test."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from clip_retrieval.data.dataset import KeyedImages, RetrievalDataset
from clip_retrieval.data.negatives import Negatives
from clip_retrieval.errors import UserError, format_counts, format_share
from clip_retrieval.log import log

HELD_OUT = ("test", "val")
"""The splits that can be held out, in the order of their shares of the hash: test does not depend on --val_fraction."""


class SelectedImages:
    """Some images of a data set, which are files or the bytes of files.

    Args:
        images: all images.
        rows: int64 (n,), the selected ones.
    """

    def __init__(self, images: Any, rows: np.ndarray):
        self.images = images
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        return self.images[int(self.rows[index])]

    def name(self, index: int) -> str:
        return self.images.name(int(self.rows[index]))

    def key(self, index: int) -> str:
        return self.images.key(int(self.rows[index]))

    def stamp(self, index: int) -> tuple[int, int]:
        return self.images.stamp(int(self.rows[index]))

    def encoded(self, index: int) -> bytes:
        return self.images.encoded(int(self.rows[index]))


def select(dataset: RetrievalDataset, images: np.ndarray, captions: np.ndarray, split: str) -> RetrievalDataset:
    """Select images and captions, and the pairs of both.

    Args:
        dataset: the data set.
        images: bool (images,), the images to keep.
        captions: bool (captions,), the captions to keep.
        split: name of the selection.
    """
    image_rows, caption_rows = np.flatnonzero(images), np.flatnonzero(captions)
    kept = dataset.pairs[images[dataset.pairs[:, 0]] & captions[dataset.pairs[:, 1]]]
    pairs = np.stack([np.searchsorted(image_rows, kept[:, 0]), np.searchsorted(caption_rows, kept[:, 1])], axis=1)
    return RetrievalDataset(
        dataset.name,
        split,
        SelectedImages(dataset.images, image_rows),
        _take(dataset.captions, caption_rows),
        pairs,
        dataset.image_ids and _take(dataset.image_ids, image_rows),
        dataset.text_ids and _take(dataset.text_ids, caption_rows),
        dataset.negatives and Negatives.from_lists(_take(dataset.negatives.lists(), caption_rows)),
    )


def _take(items: Sequence[Any], rows: np.ndarray) -> list[Any]:
    return [items[row] for row in rows.tolist()]


def without_empty_captions(dataset: RetrievalDataset) -> RetrievalDataset:
    """Leave out empty captions, and images that have no other caption; log their numbers."""
    captions = np.fromiter(map(bool, dataset.captions), bool, len(dataset.captions))
    if captions.all():
        return dataset
    keeps = captions[dataset.pairs[:, 1]]
    images = np.ones(len(dataset.images), bool)
    images[dataset.pairs[~keeps, 0]] = False
    images[dataset.pairs[keeps, 0]] = True
    share = format_share(int(np.sum(~captions)), len(captions), "caption")
    log.warning(
        f"{dataset.name} {dataset.split}: {share} empty and left out; so are images "
        f"without another caption: {np.count_nonzero(~images):,}"
    )
    return select(dataset, images, captions, dataset.split)


def without_images(dataset: RetrievalDataset, rows: Sequence[int], problem: str) -> RetrievalDataset:
    """Leave out images that cannot be read, and the captions of no other image; log their number.

    Args:
        dataset: the data set.
        rows: the images to leave out.
        problem: what they are, with the first of them, for the log.
    """
    if not len(rows):
        return dataset
    images = np.ones(len(dataset.images), bool)
    images[np.asarray(rows)] = False
    log.warning(f"{dataset.name} {dataset.split}: {format_share(len(rows), len(images), 'image')} left out, {problem}")
    return select(dataset, images, _captions_of(dataset, images), dataset.split)


def _captions_of(dataset: RetrievalDataset, images: np.ndarray) -> np.ndarray:
    """Select the captions of the selected images, and those of no image: bool (captions,)."""
    captions = np.ones(len(dataset.captions), bool)
    keeps = images[dataset.pairs[:, 0]]
    captions[dataset.pairs[~keeps, 1]] = False
    captions[dataset.pairs[keeps, 1]] = True
    return captions


def hold_out(dataset: RetrievalDataset, split: str, fractions: dict[str, float]) -> RetrievalDataset:
    """Return one split of a data set, of which val and test are held out.

    A hash of an image's name decides its split, so further images move no other one. All captions of an image are in
    its split.

    Args:
        dataset: the whole data set.
        split: the split to return: "train", "val" or "test".
        fractions: the share of the images that is held out for "val" and for "test".

    Raises:
        UserError: the split has no images, or the images have no names.
    """
    if not isinstance(dataset.images, KeyedImages):
        raise UserError(f"--{split}_fraction is not for --dataset {dataset.name}, whose images have no names; drop it")
    # one file under several names is one image: the first name decides
    files = [os.path.abspath(dataset.images.name(index)) for index in range(len(dataset.images))]  # noqa: PTH100
    names: dict[str, str] = {}
    for index, file in enumerate(files):
        names.setdefault(file, dataset.images.key(index))
    images = np.array([_choose_split(_hash_place(names[file]), fractions) == split for file in files], bool)
    if not images.any():
        option = " and ".join(f"--{name}_fraction {fractions[name]:g}" for name in HELD_OUT if fractions[name])
        raise UserError(
            f"{option}: none of {format_counts(image=len(images))} is in the {split} split; change the fraction"
        )
    return select(dataset, images, _captions_of(dataset, images), split)


def _choose_split(place: float, fractions: dict[str, float]) -> str:
    end = 0.0
    for name in HELD_OUT:
        end += fractions[name]
        if place < end:
            return name
    return "train"


def _hash_place(name: str) -> float:
    """Hash a name to a number in [0, 1)."""
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48
