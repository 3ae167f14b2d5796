"""Read and decode the pairs of a lane, on demand.

An unusable sample (no image, an image that cannot be decoded, no caption) is skipped and replaced by the next usable
sample of its lane, which then appears twice. A lane without a usable sample repeats one sample of another lane for the
whole epoch. So the pair at a position depends on no earlier position, and a resumed run needs no list of skipped
samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from clip_retrieval.data.images.duplicates import image_key
from clip_retrieval.data.pixels.jpeg import JpegFile, JpegTransform
from clip_retrieval.data.pixels.pixels import ImageTransform
from clip_retrieval.data.shards.order import Segment, ShardOrder, Shuffle
from clip_retrieval.data.shards.samples import SkipSample, image_ending, read_sample_captions, read_samples
from clip_retrieval.data.shards.sources import Place
from clip_retrieval.errors import UserError


class Pair(NamedTuple):
    """An image as the model's input, uint8 (3, height, width), or its file; its caption, and its `image_key`."""

    pixels: Tensor | JpegFile
    caption: str
    key: int


class LaneReader:
    """Reads the pairs of a lane.

    Args:
        order: assigns samples to lanes.
        transform: from an image to the model's input.
        caption_key: the key of the caption in a .json; by default the .txt is read if there is one.
    """

    def __init__(self, order: ShardOrder, transform: ImageTransform | JpegTransform, caption_key: str | None = None):
        self.order = order
        self.transform = transform
        self.caption_key = caption_key

    def __call__(self, epoch: int, lane: int, first: int) -> Iterator[tuple[Pair, str | None]]:
        """Read the pairs of a lane in an epoch from number `first` on, endlessly.

        Yields:
            A pair, and None; or, if the pair replaces an unusable sample, that sample's name and problem.

        Raises:
            UserError: a shard cannot be read, or no sample of any lane is usable.
        """
        replaced: list[str] = []  # the unusable samples since the last pair
        last_round = None
        for segment, numbers in self.order.lane(epoch, lane, first):
            last_round = segment.round if last_round is None else last_round
            # a whole round without a usable sample: take one of another lane
            if segment.round > last_round + 1:
                fallback = self._find_fallback(epoch, lane, replaced[0])
                for problem in replaced:
                    yield fallback, problem
                replaced, last_round = [], segment.round - 1
            # the lane's own pairs, each also in place of the unusable samples before it
            for pair in self._read_pairs(epoch, segment, numbers):
                if isinstance(pair, str):
                    replaced.append(pair)
                    continue
                for problem in replaced:
                    yield pair, problem
                yield pair, None
                replaced, last_round = [], segment.round
            # a shard of unknown size, all of which is before `first`
            if isinstance(numbers, Shuffle) and 0 < self.order.shards.count(segment.shard) <= numbers.first:
                last_round = None

    def _find_fallback(self, epoch: int, lane: int, problem: str) -> Pair:
        """Find the pair that replaces all samples of a lane without a usable one."""
        for segment, numbers in self.order.fallback(epoch, lane):
            for pair in self._read_pairs(epoch, segment, numbers):
                if isinstance(pair, Pair):
                    return pair
        raise UserError(f"{problem}; no other sample is usable either")

    def _read_pairs(self, epoch: int, segment: Segment, numbers: np.ndarray | Shuffle) -> Iterator[Pair | str]:
        """Read the pairs with these numbers; for an unusable sample, yield its name and problem."""
        path = self.order.shards.paths[segment.shard]
        for number, sample in read_in_order(self.order, segment, numbers):
            seed = (self.order.seed, epoch, segment.shard, number, segment.round)
            try:
                rng = np.random.default_rng(seed)
                yield decode_sample(sample, path, self.transform, self.caption_key, rng)
            except SkipSample as problem:
                yield str(problem)


def decode_sample(
    sample: dict[str, Any],
    path: Place,
    transform: ImageTransform | JpegTransform,
    caption_key: str | None,
    rng: np.random.Generator,
) -> Pair:
    """Decode a sample's image, and draw one of its captions.

    Raises SkipSample, naming the shard and the sample, if it has no readable image or no caption.
    """
    name = f"{path}, sample {sample['__key__']}"
    try:
        captions = read_sample_captions(sample, caption_key)
        content = sample[image_ending(sample)]
        caption = captions[rng.integers(len(captions))]
        pixels = transform.read(content, name, int(rng.integers(2**63)))
    except SkipSample as problem:
        raise SkipSample(f"{name}: {problem}") from None
    except UserError as error:
        raise SkipSample(str(error)) from None
    return Pair(pixels, caption, image_key(content))


def read_in_order(
    order: ShardOrder, segment: Segment, numbers: np.ndarray | Shuffle
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the samples of a segment with these numbers, in this order; the shard itself is read in file order.

    Raises UserError if the number of samples in the shard differs from its count.
    """
    if isinstance(numbers, Shuffle):
        yield from read_shuffled(order, segment, numbers)
        return
    shard = segment.shard
    wanted, pending = set(numbers.tolist()), {}
    first = min(wanted)
    samples = enumerate(read_samples(order.shards.paths[shard], first), first)
    for number in numbers.tolist():
        while number not in pending:
            position, sample = next(samples, (None, None))
            if sample is None:
                raise _make_count_error(order, shard, "fewer")
            if position in wanted:
                pending[position] = sample
        yield number, pending.pop(number)
    count = order.shards.count(shard)
    if segment.end == count and any(position >= count for position, _ in samples):
        raise _make_count_error(order, shard, "more")


def read_shuffled(order: ShardOrder, segment: Segment, shuffle: Shuffle) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read all samples of a shard in the order that `read_in_order` would have, and record their number."""
    buffer: list[tuple[int, dict[str, Any]]] = []
    number = -1
    for number, sample in enumerate(read_samples(order.shards.paths[segment.shard])):
        if number < shuffle.size:
            buffer.append((number, sample))
            continue
        place = int(shuffle.rng.integers(shuffle.size))
        if number - shuffle.size >= shuffle.first:
            yield buffer[place]
        buffer[place] = number, sample
    order.shards.record(segment.shard, number + 1)
    remaining = shuffle.rng.permutation(np.arange(len(buffer)))
    for place in remaining[max(0, shuffle.first - (number + 1 - len(buffer))) :].tolist():
        yield buffer[place]


def _make_count_error(order: ShardOrder, shard: int, than: str) -> UserError:
    path, count = order.shards.paths[shard], order.shards.count(shard)
    return UserError(
        f"{path}: holds {than} samples than the {count:,} that were counted before or are listed in its sizes.json; "
        "restore the shard, or delete that sizes.json and restart the run (--overwrite)"
    )
