"""Which pairs a training batch holds.

The order is a pure function of the seed and the epoch, made for the global batch; a process takes its slice of it.
So the batches are the same for any number of processes, and a run can go on from any batch of an epoch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.errors import UserError


@dataclass(frozen=True)
class Batch:
    """One global batch: int64 (batch_size,) image and caption indices of its pairs."""

    images: np.ndarray
    captions: np.ndarray


class BatchSampler:
    """The global batches of each epoch.

    Args:
        dataset: where the pairs come from.
        batch_size: pairs in a global batch.
        sampling: "all": every pair once an epoch, arranged so that no image stands twice in a batch where that
            can be avoided; "one": each image that has a caption once an epoch, with a random one of its captions.
        seed: seed of every epoch's order.

    The remainder of an epoch, fewer than batch_size pairs, is dropped: other ones each epoch.
    """

    def __init__(self, dataset: RetrievalDataset, batch_size: int, sampling: str = "all", seed: int = 0):
        self.dataset = dataset
        self.batch_size = batch_size
        self.sampling = sampling
        self.seed = seed

    @property
    def settings(self) -> dict[str, int | str]:
        """What decides the order, under the names of the options: a run goes on only with the same."""
        return {"batch_size": self.batch_size, "caption_sampling": self.sampling, "seed": self.seed}

    @property
    def fingerprint(self) -> int:
        """A checksum of the pairs: a run goes on only with the data that it began with."""
        return zlib.crc32(self.dataset.pairs.tobytes())

    def __len__(self) -> int:
        """Batches in an epoch."""
        return number_of_samples(self.dataset, self.sampling) // self.batch_size

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch number `first_batch` on."""
        rng = np.random.default_rng((self.seed, epoch))
        pairs = self._every_pair(rng) if self.sampling == "all" else self._one_pair_per_image(rng)
        for rows in pairs[first_batch:]:
            yield Batch(images=self.dataset.pairs[rows, 0], captions=self.dataset.pairs[rows, 1])

    def _one_pair_per_image(self, rng: np.random.Generator) -> np.ndarray:
        first = self.dataset.first_pair
        described = np.flatnonzero(first[1:] > first[:-1])
        images = rng.permutation(described)[: len(self) * self.batch_size]
        return rng.integers(first[images], first[images + 1]).reshape(-1, self.batch_size)

    def _every_pair(self, rng: np.random.Generator) -> np.ndarray:
        """int64 (batches, batch_size): rows of `pairs`.

        The pairs, those of an image one after the other, are dealt to the batches like cards: in each round every
        batch gets one pair, in an order drawn anew. An image whose pairs fall into one round meets each batch once;
        where they run over into the next round, that round's order is arranged so that the image meets other
        batches first. So an image stands twice in a batch only if it has more pairs than there are batches.
        """
        batches, pairs = len(self), self.dataset.pairs
        kept = rng.permutation(len(pairs))[: batches * self.batch_size]
        image_order = rng.permutation(len(self.dataset.images))
        kept = kept[np.argsort(image_order[pairs[kept, 0]], kind="stable")]
        image = pairs[kept, 0].reshape(self.batch_size, batches)
        order = rng.permuted(np.tile(np.arange(batches), (self.batch_size, 1)), axis=1)
        for round in range(1, self.batch_size):
            split_image = image[round, 0]
            if image[round - 1, -1] != split_image:
                continue
            # The batches the image has met in the last round, and how many it meets at the start of this one.
            met = order[round - 1, image[round - 1] == split_image]
            ahead = np.count_nonzero(image[round] == split_image)
            order[round] = _put_others_first(order[round], met, ahead)
        dealt = np.empty_like(order)
        np.put_along_axis(dealt, order, kept.reshape(self.batch_size, batches), axis=1)
        return dealt.T


def _put_others_first(order: np.ndarray, met: np.ndarray, ahead: int) -> np.ndarray:
    """`order`, with the elements of `met` among its first `ahead` exchanged for later ones, as far as there are any."""
    order = order.copy()
    is_met = np.isin(order, met)
    to_move = np.flatnonzero(is_met[:ahead])
    free = ahead + np.flatnonzero(~is_met[ahead:])
    n = min(len(to_move), len(free))
    to_move, free = to_move[:n], free[:n]
    order[to_move], order[free] = order[free], order[to_move]
    return order


def number_of_samples(dataset: RetrievalDataset, sampling: str) -> int:
    """Pairs that an epoch goes through, its dropped remainder included."""
    return len(dataset.pairs) if sampling == "all" else len(np.unique(dataset.pairs[:, 0]))


def process_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """The part of a global batch that process `rank` of `world_size` computes.

    Raises UserError where the processes do not divide the batch.
    """
    if batch_size % world_size:
        raise UserError(
            f"--batch_size {batch_size} cannot be split over {world_size} processes; choose a multiple of it"
        )
    share = batch_size // world_size
    return slice(rank * share, (rank + 1) * share)
