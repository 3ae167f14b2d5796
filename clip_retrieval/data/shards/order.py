"""Assign the samples of tar shards to training batches.

A global batch consists of lanes; each lane reads its own part of the shards sequentially. The batch size and the shards
determine the lanes; processes and their workers divide the lanes among them. So the batches are the same for any number
of processes and workers: a pure function of the seed and the epoch.

A run can resume at any batch of an epoch without losing or repeating a sample: a lane finds its shard from the counts,
and its position in the shard from the headers. Of that shard only, it reads the shuffle buffer again, undecoded. If the
numbers of samples of remote or compressed shards are unknown, it reads those before its position again as well.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from clip_retrieval.data.shards.samples import count_samples
from clip_retrieval.data.shards.sources import Place, is_forward
from clip_retrieval.errors import UserError
from clip_retrieval.files import explain_errors, open_regular

MAX_LANES = 32  # more only if a batch has more than LANE_SHARE pairs for each
LANE_SHARE = 128
PROBE_BYTES = 2**16  # read at three positions of a shard for the fingerprint


class Shards:
    """Tar shards and their numbers of samples. An unknown number is counted at its first use.

    Args:
        paths: the files or addresses.
        sizes: samples of each shard, None if unknown.
    """

    def __init__(self, paths: Sequence[Place], sizes: Sequence[int | None] | None = None):
        self.paths = paths
        self._sizes = list(sizes or [None] * len(paths))

    def __len__(self) -> int:
        return len(self.paths)

    def count(self, shard: int) -> int:
        """Samples of a shard. Raises UserError if it must be counted and is damaged."""
        if (size := self._sizes[shard]) is None:
            size = self._sizes[shard] = count_samples(self.paths[shard])
        return size

    def known(self, shard: int) -> int | None:
        """Samples of a shard; None if it must be read to its end to count them."""
        unknown = self._sizes[shard] is None and is_forward(self.paths[shard])
        return None if unknown else self.count(shard)

    def record(self, shard: int, size: int) -> None:
        """Record the number of samples of a shard that was read to its end."""
        self._sizes[shard] = size


@dataclass(frozen=True)
class Segment:
    """Samples `begin` to `end` - 1 of a shard, in a lane's `round`: 0, then 1 if the lane starts over, and so on.

    `end` is None for a whole shard with an unknown number of samples.
    """

    shard: int
    begin: int
    end: int | None
    round: int = 0


@dataclass(frozen=True)
class Shuffle:
    """The order of a shard with an unknown number of samples: that of `shuffle_in_buffer`, from number `first` on."""

    size: int
    rng: np.random.Generator
    first: int


class ShardOrder:
    """The order of the samples in each epoch.

    Args:
        shards: the shards.
        batch_size: pairs in a global batch.
        num_samples: pairs in an epoch. By default all samples, each at most once: the shards are counted, the lanes
            take equal parts of them, and the remainder, fewer than batch_size, is dropped (different samples each
            epoch). If given, each lane takes whole shards, and starts over after the last one.
        shuffle_buffer: samples in the buffers of all lanes together; a buffer shuffles within a shard.
        seed: seed of every epoch's order.
    """

    order: tuple[int, np.ndarray] | None = None  # it does not follow from the weights

    def __init__(
        self,
        shards: Shards,
        batch_size: int,
        *,
        num_samples: int | None = None,
        shuffle_buffer: int = 0,
        seed: int = 0,
    ):
        self.shards = shards
        self.batch_size = batch_size
        self.num_samples = num_samples
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.lanes = number_of_lanes(batch_size, len(shards) if num_samples else batch_size)
        self.lane_share = batch_size // self.lanes

    @property
    def settings(self) -> dict[str, int | None]:
        """The options that decide the order, by name: a run resumes only with the same ones."""
        return {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle_buffer": self.shuffle_buffer,
            "train_num_samples": self.num_samples,
        }

    @cached_property
    def fingerprint(self) -> int:
        """A checksum of the shards' names, sizes and some of their bytes: a run resumes only with the same data.

        Of remote shards it has the names and, without num_samples, the numbers of samples.
        """
        names = [path.name for path in self.shards.paths]
        contents = [_probe(path) for path in self.shards.paths if isinstance(path, Path)]
        counts = [] if self.num_samples else self._counts.tolist()
        return zlib.crc32(repr((names, contents, counts)).encode(errors="surrogatepass"))

    @cached_property
    def _counts(self) -> np.ndarray:
        return np.array([self.shards.count(shard) for shard in range(len(self.shards))])

    @property
    def samples(self) -> int:
        """Pairs in an epoch, the dropped remainder included."""
        return self.num_samples or int(self._counts.sum())

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.samples // self.batch_size

    def lane(self, epoch: int, lane: int, first: int = 0) -> Iterator[tuple[Segment, np.ndarray | Shuffle]]:
        """The samples of a lane in an epoch, from its sample number `first` on, endlessly.

        Yields:
            A segment, and int64 (n,): its samples' numbers in the shard, in the order of training. If its `end` is
            None, a `Shuffle` instead; its number of samples must be recorded before the next segment.
        """
        size = max(1, self.shuffle_buffer // self.lanes)
        for segment in self._segments(epoch, lane):
            rng = np.random.default_rng((self.seed, epoch, segment.shard, segment.begin, segment.round))
            if segment.end is None:
                yield segment, Shuffle(size, rng, first)
                first = max(0, first - self.shards.count(segment.shard))
                continue
            number = segment.end - segment.begin
            if first >= number:
                first -= number
                continue
            yield segment, segment.begin + shuffle_in_buffer(number, size, rng)[first:]
            first = 0

    def fallback(self, epoch: int, lane: int) -> Iterator[tuple[Segment, np.ndarray]]:
        """All samples, for a lane without usable samples of its own.

        Yields:
            As `lane`, but each sample once, in the order of the shards' files, from another shard for each lane.
        """
        for shard in np.roll(self._shuffle_shards(epoch)[0], -lane - 1).tolist():
            if count := self.shards.count(shard):
                yield Segment(shard, 0, count), np.arange(count)

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.random.Generator]:
        """The shards in an epoch's order, and the generator of further draws."""
        rng = np.random.default_rng((self.seed, epoch))
        return rng.permutation(len(self.shards)), rng

    def _segments(self, epoch: int, lane: int) -> Iterator[Segment]:
        shards, rng = self._shuffle_shards(epoch)
        if self.num_samples:
            yield from self._repeat_shards(shards[lane :: self.lanes].tolist())
        # the first lane starts anywhere in the circle of samples: that decides which are dropped, even for one shard
        length = len(self) * self.lane_share
        start = int(rng.integers(self.samples)) + lane * length
        own = self._cut_part(shards, start, start + length)
        for round in itertools.count():
            for shard, begin, end in own:
                yield Segment(shard, begin, end, round)

    def _repeat_shards(self, shards: list[int]) -> Iterator[Segment]:
        for round in itertools.count():
            for shard in shards:
                yield Segment(shard, 0, self.shards.known(shard), round)
            if not any(map(self.shards.count, shards)):
                raise UserError(f"{self.shards.paths[shards[0]]}: holds no images with captions; remove it")

    def _cut_part(self, shards: np.ndarray, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(shard, begin, end) of the samples between two positions of the circle that the shards form."""
        ends = np.cumsum(self._counts[shards])
        total, found = int(ends[-1]), []
        for turn in range(stop // total + 1):
            low, high = max(start - turn * total, 0), min(stop - turn * total, total)
            for shard, end in zip(shards.tolist(), ends.tolist()):
                first = end - int(self._counts[shard])
                if max(low, first) < min(high, end):
                    found.append((shard, max(low, first) - first, min(high, end) - first))
        return found


def _probe(path: Path) -> tuple[int, int]:
    """Return a file's size, and a checksum of its beginning, middle and end (of everything in a small file).

    Raises UserError if it cannot be read.
    """
    checksum = 0
    with explain_errors(path), open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        for begin in (0, max(0, size - PROBE_BYTES) // 2, max(0, size - PROBE_BYTES)):
            file.seek(begin)
            checksum = zlib.crc32(file.read(PROBE_BYTES), checksum)
    return size, checksum


def number_of_lanes(batch_size: int, most: int) -> int:
    """Choose the number of lanes: a divisor of the batch size, at most `most`.

    It is as large as possible, and a power of two times other divisors of the batch size, so that any usual number of
    processes can share the lanes: also 3, 6 or 12 if the batch size is a multiple of 3.
    """
    odd = next((factor for factor in (3, 5, 7) if batch_size % factor == 0), 1)
    usual = max(MAX_LANES, batch_size // LANE_SHARE)
    power = min(batch_size & -batch_size, 1 << (min(most, usual).bit_length() - 1))
    most = min(most, odd * usual)
    shared = [n for n in range(power, most + 1, power) if batch_size % n == 0]
    return max([n for n in shared if n % odd == 0] or shared)


def shuffle_in_buffer(number: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """int64 (number,): the order in which 0, 1, ... leave a shuffle buffer of `size` elements."""
    order = np.empty(number, np.int64)
    buffer = np.arange(min(size, number))
    for i, place in enumerate(rng.integers(size, size=max(0, number - size)).tolist()):
        order[i] = buffer[place]
        buffer[place] = size + i
    order[number - len(buffer) :] = rng.permutation(buffer)
    return order
