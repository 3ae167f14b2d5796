"""Assign the pairs of a data set to training batches.

The global batches are a pure function of the seed and the epoch; each process takes its slice. So the batches are the
same for any number of processes, and a run can resume at any batch of an epoch.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Protocol

import numpy as np

from clip_retrieval.data.captions import normalize_caption
from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.mixture import Mixture
from clip_retrieval.errors import UserError


@dataclass(frozen=True)
class Batch:
    """One global batch: int64 (batch_size,) image and caption indices of its pairs.

    negatives: the negative caption of each caption, as an index in `RetrievalDataset.texts`, or -1; None without them.
    """

    images: np.ndarray
    captions: np.ndarray
    negatives: np.ndarray | None = None


class Sampler(Protocol):
    """The order of the pairs of a run, in global batches."""

    batch_size: int
    order: tuple[int, np.ndarray] | None
    """The last epoch whose order follows from the weights, and its batches, int64 (batches, batch_size)."""

    @property
    def settings(self) -> Mapping[str, int | float | str | None]:
        """The options that decide the order, by name: a run resumes only with the same ones."""
        ...

    @property
    def fingerprint(self) -> int:
        """A checksum of the data: a run resumes only with the same data."""
        ...

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...


class BatchSampler:
    """The global batches of each epoch.

    Args:
        dataset: the data set.
        batch_size: pairs in a global batch.
        sampling: "all": every pair once per epoch, without duplicates of an image in a batch if possible; "one": each
            image with a caption once per epoch, with a random one of its captions.
        seed: seed of every epoch's order.
        weights: the weight of each part of a Mixture. An epoch keeps its length, and each part gets a proportional
            share of its pairs (with "one", its images). A share larger than the part repeats the part as often as
            possible and draws the rest at random; a smaller one is drawn at random. Draws differ by epoch.
        hard_negatives: the share of a batch that are near neighbours of others, and by which side, "image" or "text";
            `training.hard_negatives` sets the `order` of each epoch.

    The remainder of an epoch, fewer than batch_size pairs, is dropped (different pairs each epoch).
    """

    order: tuple[int, np.ndarray] | None = None

    def __init__(
        self,
        dataset: RetrievalDataset,
        batch_size: int,
        sampling: str = "all",
        seed: int = 0,
        weights: Sequence[float] | None = None,
        hard_negatives: tuple[float, str] | None = None,
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.sampling = sampling
        self.seed = seed
        self.weights = None if weights is None else tuple(weights)
        self.hard_negatives = hard_negatives

    @property
    def settings(self) -> dict[str, int | float | str | None]:
        """The options that decide the order, by name: a run resumes only with the same ones."""
        return {
            "batch_size": self.batch_size,
            "caption_sampling": self.sampling,
            "seed": self.seed,
            "dataset_weights": None if self.weights is None else " ".join(map(str, self.weights)),
            "hard_negatives": self.hard_negatives and self.hard_negatives[0],
            "hard_negatives_by": self.hard_negatives and self.hard_negatives[1],
        }

    @cached_property
    def fingerprint(self) -> int:
        """A checksum of pairs, captions and image names: a run resumes only with the same data.

        Only the last part of a name counts, because the images' folder may have moved.
        """
        dataset = self.dataset
        checksum = zlib.crc32(dataset.pairs.tobytes())
        if isinstance(dataset, Mixture):
            checksum = zlib.crc32(dataset.first_image.tobytes(), checksum)
        names = (os.path.basename(dataset.images.name(image)) for image in range(len(dataset.images)))  # noqa: PTH119
        if dataset.negatives is not None:
            checksum = zlib.crc32(dataset.negatives.first.tobytes(), checksum)
        for text in itertools.chain(dataset.texts, names):
            checksum = zlib.crc32(text.encode(errors="surrogatepass") + b"\0", checksum)
        return checksum

    @cached_property
    def shares(self) -> list[int]:
        """The number of pairs of each part of a weighted mixture in an epoch, the dropped remainder included."""
        return proportional(number_of_samples(self.dataset, self.sampling), self.weights or (1,))

    @cached_property
    def _text_numbers(self) -> np.ndarray:
        """A number for each of the dataset's texts, int64 (texts,), the same for texts that are equal, normalised."""
        number_of: dict[str, int] = {}
        return np.array([number_of.setdefault(normalize_caption(text), i) for i, text in enumerate(self.dataset.texts)])

    def __len__(self) -> int:
        """Batches in an epoch."""
        return number_of_samples(self.dataset, self.sampling) // self.batch_size

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch number `first_batch` on."""
        batches = self.order[1] if self.order is not None and self.order[0] == epoch else self.draw(epoch)
        for number, rows in enumerate(batches[first_batch:], first_batch):
            images, captions, negatives = self.dataset.pairs[rows, 0], self.dataset.pairs[rows, 1], None
            if self.dataset.negatives is not None:
                drawn = self.dataset.negatives.draw(captions, np.random.default_rng((self.seed, epoch, number, 2)))
                negatives = np.where(drawn < 0, -1, len(self.dataset.captions) + drawn)
                # a caption of another image of the batch is no negative one
                true = self._text_numbers[self.dataset.captions_of(images)[1]]
                negatives[np.isin(self._text_numbers[negatives], true)] = -1
            yield Batch(images, captions, negatives)

    def draw(self, epoch: int) -> np.ndarray:
        """Draw the batches of an epoch at random: int64 (batches, batch_size), rows of `pairs`."""
        rng = np.random.default_rng((self.seed, epoch))
        if self.weights is not None:
            return self._deal(self._draw_weighted(rng), rng)
        if self.sampling == "all":
            return self._deal(np.arange(len(self.dataset.pairs)), rng)
        images = rng.permutation(self._captioned_images)[: len(self) * self.batch_size]
        return self._draw_pairs(images, rng).reshape(-1, self.batch_size)

    @cached_property
    def _captioned_images(self) -> np.ndarray:
        """int64 (n,): the images with a caption."""
        first = self.dataset.first_pair
        return np.flatnonzero(first[1:] > first[:-1])

    def _draw_pairs(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw a row of `pairs` for each image: int64 (n,)."""
        first = self.dataset.first_pair
        return rng.integers(first[images], first[images + 1])

    def _draw_weighted(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the share of each part: int64 (n,), rows of `pairs`."""
        bounds = self.dataset.first_image
        if self.sampling == "all":
            pairs = np.arange(len(self.dataset.pairs))
            parts = np.split(pairs, self.dataset.first_pair[bounds[1:-1]])
            return np.concatenate([_draw_repeatedly(part, share, rng) for part, share in zip(parts, self.shares)])
        parts = np.split(self._captioned_images, np.searchsorted(self._captioned_images, bounds[1:-1]))
        images = np.concatenate([_draw_repeatedly(part, share, rng) for part, share in zip(parts, self.shares)])
        return self._draw_pairs(images, rng)

    def _deal(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Deal these rows of `pairs` to batches, without the remainder: int64 (batches, batch_size).

        The pairs, grouped by image, are dealt like cards: in each round every batch gets one pair, in a new random
        order. If an image's pairs are all in one round, each batch gets at most one of them. If they extend into the
        next round, that round's order puts batches without this image first. So an image is twice in a batch only if
        it has more pairs than there are batches.
        """
        # drop the remainder, and group the pairs by image
        batches, pairs = len(self), self.dataset.pairs
        kept = rows[rng.permutation(len(rows))[: batches * self.batch_size]]
        image_order = rng.permutation(len(self.dataset.images))
        kept = kept[np.argsort(image_order[pairs[kept, 0]], kind="stable")]
        image = pairs[kept, 0].reshape(self.batch_size, batches)
        # an order of the batches for each round
        order = rng.permuted(np.tile(np.arange(batches), (self.batch_size, 1)), axis=1)
        for round in range(1, self.batch_size):
            split_image = image[round, 0]
            if image[round - 1, -1] != split_image:
                continue
            # the batches with the image in the last round, and the number of its pairs in this one
            met = order[round - 1, image[round - 1] == split_image]
            ahead = int(np.count_nonzero(image[round] == split_image))
            order[round] = _put_others_first(order[round], met, ahead)
        dealt = np.empty_like(order)
        np.put_along_axis(dealt, order, kept.reshape(self.batch_size, batches), axis=1)
        return dealt.T


def _put_others_first(order: np.ndarray, met: np.ndarray, ahead: int) -> np.ndarray:
    """Swap elements of `met` among the first `ahead` of `order` with later elements that are not in `met`."""
    order = order.copy()
    is_met = np.isin(order, met)
    to_move = np.flatnonzero(is_met[:ahead])
    free = ahead + np.flatnonzero(~is_met[ahead:])
    n = min(len(to_move), len(free))
    to_move, free = to_move[:n], free[:n]
    order[to_move], order[free] = order[free], order[to_move]
    return order


def _draw_repeatedly(items: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `number` items: repeat all of them as often as possible, and draw the rest without replacement."""
    whole, rest = divmod(number, len(items))
    return np.concatenate([np.tile(items, whole), rng.choice(items, rest, replace=False)])


def proportional(total: int, weights: Sequence[float]) -> list[int]:
    """Divide `total` in proportion to the weights. Shares are rounded down; the largest remainders get the rest."""
    exact = [Fraction(weight) for weight in weights]
    shares = [total * weight / sum(exact) for weight in exact]
    floors = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: floors[i] - shares[i])
    for i in by_remainder[: total - sum(floors)]:
        floors[i] += 1
    return floors


def number_of_samples(dataset: RetrievalDataset, sampling: str) -> int:
    """Return the number of pairs in an epoch, the dropped remainder included."""
    return len(dataset.pairs) if sampling == "all" else len(np.unique(dataset.pairs[:, 0]))


def process_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """Return process `rank`'s part of a global batch.

    Raises UserError if the number of processes does not divide the batch size.
    """
    if batch_size % world_size:
        raise UserError(
            f"--batch_size {batch_size} cannot be split over {world_size} processes; choose a multiple of it"
        )
    share = batch_size // world_size
    return slice(rank * share, (rank + 1) * share)
