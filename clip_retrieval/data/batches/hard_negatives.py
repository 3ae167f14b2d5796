"""Compose the batches of an epoch of near neighbours: hard negatives of each other.

Each batch starts with random pairs. In rounds, each of its members then adds its nearest unused neighbour, until the
wished share of the batch is reached. The pairs of the epoch stay the same, and so does their number in a batch.

A false negative is never added: images with a caption or with the bytes of an image in the batch are skipped.
Neighbours are found among entities, the distinct images or the distinct captions; an entity has one or more pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clip_retrieval.data.captions import normalize_caption
from clip_retrieval.data.dataset import EncodedImages, RetrievalDataset, StoredImages
from clip_retrieval.data.images.duplicates import find_duplicates
from clip_retrieval.data.mixture import MixedImages
from clip_retrieval.errors import UserError

FindNeighbours = Callable[[np.ndarray], np.ndarray]
"""find_neighbours(entities) returns the nearest others of each, as positions in `entities`: (n, k), nearest first."""


@dataclass(frozen=True)
class Duplicates:
    """The images and captions of a data set that mean the same.

    Attributes:
        image: int64 (images,), the first image with the same bytes.
        caption: int64 (captions,), the first caption with the same normalised text.
        first_label, labels: image i has the labels `labels[first_label[i] : first_label[i + 1]]`. Two images with a
            common label have a caption in common. Only the first image with the same bytes has labels: those of all.
        first_image, images: label l belongs to the images `images[first_image[l] : first_image[l + 1]]`.
    """

    image: np.ndarray
    caption: np.ndarray
    first_label: np.ndarray
    labels: np.ndarray
    first_image: np.ndarray
    images: np.ndarray

    @classmethod
    def find(cls, dataset: RetrievalDataset, same_bytes: np.ndarray) -> Duplicates:
        """Find them. same_bytes: int64 (images,), the first image with the same bytes."""
        number_of: dict[str, int] = {}
        caption = np.array([number_of.setdefault(normalize_caption(c), i) for i, c in enumerate(dataset.captions)])
        image, text = dataset.pairs.T
        # a label for each caption; those of a single image do not matter
        owners, labels = np.divmod(np.unique(same_bytes[image] * len(caption) + caption[text]), len(caption))
        is_shared = (np.bincount(labels) > 1)[labels]
        owners, labels = owners[is_shared], np.unique(labels[is_shared], return_inverse=True)[1]
        order = np.argsort(labels, kind="stable")
        first_label = np.searchsorted(owners, np.arange(len(same_bytes) + 1))
        first_image = np.searchsorted(labels[order], np.arange(labels.max(initial=-1) + 2))
        return cls(same_bytes, caption, first_label, labels, first_image, owners[order])


def find_same_bytes(dataset: RetrievalDataset) -> np.ndarray:
    """Find for each image the first one with the same bytes, int64 (images,).

    Only files of equal size are read. Images in memory and unreadable ones are taken for distinct.
    """
    images = dataset.images
    find = images.find if isinstance(images, MixedImages) else lambda index: (images, index)
    sizes = -1 - np.arange(len(images))  # all different
    for index in range(len(images)):
        own, place = find(index)
        if isinstance(own, StoredImages) and isinstance(own, EncodedImages):
            sizes[index] = own.stamp(place)[0]

    def read(index: int, part: slice) -> bytes:
        own, place = find(index)
        assert isinstance(own, EncodedImages)  # others have a size of their own, and are not compared
        try:
            return own.encoded(place)[part]
        except UserError:
            return b"unreadable %d" % index

    return find_duplicates(read, np.arange(len(images)), sizes, f"{dataset.name}, duplicates")


class Composer:
    """Composes the batches of one epoch.

    Args:
        image: int64 (pairs,), the image of each pair of the epoch, in random order.
        entity: int64 (pairs,), its entity, from 0.
        duplicates: the images that are not negatives of each other.
        find_neighbours: finds neighbours among entities. It is called again whenever half of the entities are used up,
            so that short lists of neighbours, (entities, k), suffice.
    """

    def __init__(self, image: np.ndarray, entity: np.ndarray, duplicates: Duplicates, find_neighbours: FindNeighbours):
        self.duplicates = duplicates
        self.find_neighbours = find_neighbours
        # the pairs of each entity, of which `left` are unused: the next one is at `end - left`
        self._pairs = np.argsort(entity, kind="stable")
        self._images = duplicates.image[image[self._pairs]]
        self._left = np.bincount(entity)
        self._end = np.cumsum(self._left)
        # random pairs come from a queue of entities
        self._queue = entity
        self._is_drawn = np.zeros(len(entity), bool)
        self._head = 0
        # the last batch with a label, and with an image or a duplicate of it
        self._batch = 0
        self._batch_of_label = np.zeros(len(duplicates.first_image) - 1, np.int64)
        self._batch_of_duplicate = np.zeros(len(duplicates.image), np.int64)
        self._taken: list[np.ndarray] = []
        # the neighbours of each entity: row `place` of the lists
        self._searched = 0
        self._place = np.zeros(len(self._left), np.int64)
        self._lists = np.empty((0, 0), np.int32)

    def compose(self, size: int, share: float) -> tuple[np.ndarray, int]:
        """Compose batches of `size` pairs, of which `share` are neighbours of others, as far as there are enough.

        Returns:
            int64 (batches, size), positions of pairs; and the number of pairs that are neighbours.
        """
        wanted = min(round(share * size), size - 1)
        batches, added = [], 0
        for _ in range(len(self._queue) // size):
            left = np.flatnonzero(self._left)
            if len(left) <= self._searched // 2 or not self._searched:
                self._search(left)
            self._batch += 1
            self._taken = []
            missing = self._add_neighbours(self._draw(size - wanted), wanted)
            added += wanted - missing
            self._draw(missing)
            batches.append(np.concatenate(self._taken))
        return np.stack(batches), added

    def _search(self, entities: np.ndarray) -> None:
        """Find the neighbours of these entities among themselves."""
        self._lists = entities.astype(np.int32)[self.find_neighbours(entities)]
        self._place[entities] = np.arange(len(entities))
        self._searched = len(entities)

    def _next_image(self, entities: np.ndarray) -> np.ndarray:
        """The image of the next pair of each entity; of any pair if none is left."""
        return self._images[self._end[entities] - np.maximum(self._left[entities], 1)]

    def _draw(self, number: int) -> np.ndarray:
        """Draw random pairs, without false negatives if possible; return their entities."""
        drawn = [self._queue[:0]]
        start, avoids = self._head, True
        while number:
            # the unused pairs in a part of the queue
            part = np.arange(start, min(start + 4 * number + 64, len(self._queue)))
            entities = self._queue[part]
            images = self._next_image(entities)
            usable = ~self._is_drawn[part] & (self._left[entities] > 0)
            if avoids:
                usable &= self._batch_of_duplicate[images] != self._batch
            # of duplicates the first one, in their order
            rows = np.flatnonzero(usable)
            rows = rows[self._first_distinct(images[rows])][:number]
            self._is_drawn[part[rows]] = True
            self._take(entities[rows])
            drawn.append(entities[rows])
            number -= len(rows)
            start += len(part)
            if start == len(self._queue):  # only duplicates are left
                start, avoids = self._head, False
        while self._head < len(self._queue) and (self._is_drawn[self._head] or not self._left[self._queue[self._head]]):
            self._head += 1
        return np.concatenate(drawn)

    def _add_neighbours(self, members: np.ndarray, number: int) -> int:
        """Add neighbours of the members, int64 (n,), and then of the added ones; return how many are missing."""
        before = 0
        while number and len(members) > before:
            # a round: each member adds its nearest neighbour; if several have the same one, the first member gets it
            before, waiting, added = len(members), members, [members]
            while number and len(waiting):
                lists = self._lists[self._place[waiting]]
                images = self._next_image(lists)
                usable = (self._left[lists] > 0) & (self._batch_of_duplicate[images] != self._batch)
                has_any = usable.any(axis=1)
                best = usable[has_any].argmax(axis=1)
                rows = np.arange(len(best))
                waiting, nearest, images = waiting[has_any], lists[has_any][rows, best], images[has_any][rows, best]
                chosen = self._first_distinct(images)[:number]
                self._take(nearest[chosen])
                added.append(nearest[chosen])
                number -= len(chosen)
                waiting = np.delete(waiting, chosen)
            members = np.concatenate(added)
        return number

    def _first_distinct(self, images: np.ndarray) -> np.ndarray:
        """Select positions in `images`, of which no two are duplicates: the first ones, in order."""
        first = np.sort(np.unique(images, return_index=True)[1])
        labels, owner = _gather(self.duplicates.first_label, self.duplicates.labels, images[first])
        _, earliest, label = np.unique(labels, return_index=True, return_inverse=True)
        is_later = owner != owner[earliest][label]
        return np.delete(first, owner[is_later])

    def _take(self, entities: np.ndarray) -> None:
        """Put the next pair of each of these distinct entities into the batch."""
        place = self._end[entities] - self._left[entities]
        self._left[entities] -= 1
        self._taken.append(self._pairs[place])
        images = self._images[place]
        labels, _ = _gather(self.duplicates.first_label, self.duplicates.labels, images)
        labels = np.unique(labels[self._batch_of_label[labels] != self._batch])
        self._batch_of_label[labels] = self._batch
        same, _ = _gather(self.duplicates.first_image, self.duplicates.images, labels)
        self._batch_of_duplicate[np.concatenate([images, same])] = self._batch


def _gather(first: np.ndarray, values: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate `values[first[key] : first[key + 1]]` of all keys; also return the position of the key of each."""
    count = first[keys + 1] - first[keys]
    owner = np.repeat(np.arange(len(keys)), count)
    inside = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return values[np.repeat(first[keys], count) + inside], owner
