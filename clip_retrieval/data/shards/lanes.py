"""The pairs of a lane, decoded as a training batch asks for them.

Samples that cannot be used (no image, an image that cannot be decoded, no caption) are left out: the next one of the
lane stands in for such a one, and is then there twice. For a lane that has none, one of another lane does, the same all
epoch. So what stands at a place depends on nothing before it, and a run that goes on there need not know what was left
out.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from clip_retrieval.data.images.decode import decode_rgb
from clip_retrieval.data.images.duplicates import image_key
from clip_retrieval.data.pixels.pixels import ImageTransform
from clip_retrieval.data.shards.order import Segment, ShardOrder
from clip_retrieval.data.shards.samples import Unusable, captions_of, image_ending, read_samples
from clip_retrieval.errors import UserError


class Pair(NamedTuple):
    """An image as the model sees it, uint8 (3, height, width), its caption, and its `image_key`."""

    pixels: Tensor
    caption: str
    key: int


class LaneReader:
    """Reads the pairs of a lane.

    Args:
        order: which samples the lanes hold.
        transform: what the model sees of an image.
        caption_key: the key of the caption in a .json; by default it is that of the .txt, if there is one.
    """

    def __init__(self, order: ShardOrder, transform: ImageTransform, caption_key: str | None = None):
        self.order = order
        self.transform = transform
        self.caption_key = caption_key

    def __call__(self, epoch: int, lane: int, first: int) -> Iterator[tuple[Pair, str | None]]:
        """The pairs of a lane in an epoch from number `first` on, without end.

        Yields:
            A pair; and where it stands in for a sample that cannot be used, which one that is, and why.

        Raises:
            UserError: a shard cannot be read, or no sample at all can be used.
        """
        replaced: list[str] = []
        last_round = None
        for segment, numbers in self.order.lane(epoch, lane, first):
            last_round = segment.round if last_round is None else last_round
            if segment.round > last_round + 1:  # a whole round had none
                stand_in = self._elsewhere(epoch, lane, replaced[0])
                for problem in replaced:
                    yield stand_in, problem
                replaced, last_round = [], segment.round - 1
            for pair in self._pairs(epoch, segment, numbers):
                if isinstance(pair, str):
                    replaced.append(pair)
                    continue
                for problem in replaced:
                    yield pair, problem
                yield pair, None
                replaced, last_round = [], segment.round

    def _elsewhere(self, epoch: int, lane: int, problem: str) -> Pair:
        """The pair that stands in for a lane's that cannot be used, one and all."""
        for segment, numbers in self.order.elsewhere(epoch, lane):
            for pair in self._pairs(epoch, segment, numbers):
                if isinstance(pair, Pair):
                    return pair
        raise UserError(f"{problem}; nor can any other sample be used")

    def _pairs(self, epoch: int, segment: Segment, numbers: np.ndarray) -> Iterator[Pair | str]:
        """The pairs with these numbers; of one that cannot be used, its name and why."""
        path = self.order.shards.paths[segment.shard]
        for number, sample in read_in_order(self.order, segment, numbers):
            seed = (self.order.seed, epoch, segment.shard, number, segment.round)
            try:
                rng = np.random.default_rng(seed)
                yield decode_sample(sample, path, self.transform, self.caption_key, rng)
            except Unusable as problem:
                yield str(problem)


def decode_sample(
    sample: dict[str, bytes], path: Path, transform: ImageTransform, caption_key: str | None, rng: np.random.Generator
) -> Pair:
    """A sample's image and one of its captions.

    Raises Unusable, with the names of the shard and the sample, where it has no image or no caption.
    """
    name = f"{path}, sample {sample['__key__']}"
    try:
        captions = captions_of(sample, caption_key)
        content = sample[image_ending(sample)]
        image = decode_rgb(io.BytesIO(content), name)
    except Unusable as problem:
        raise Unusable(f"{name}: {problem}") from None
    except UserError as error:
        raise Unusable(str(error)) from None
    caption = captions[rng.integers(len(captions))]
    return Pair(transform(image, int(rng.integers(2**63))), caption, image_key(content))


def read_in_order(order: ShardOrder, segment: Segment, numbers: np.ndarray) -> Iterator[tuple[int, dict[str, bytes]]]:
    """The samples of a segment with these numbers, in this order. The shard is read from its first to its last one.

    Raises UserError where the shard holds other than its count of samples.
    """
    shard = segment.shard
    wanted, waiting = set(numbers.tolist()), {}
    first = min(wanted)
    samples = enumerate(read_samples(order.shards.paths[shard], first), first)
    for number in numbers.tolist():
        while number not in waiting:
            at, sample = next(samples, (None, None))
            if sample is None:
                raise _other_count(order, shard, "fewer")
            if at in wanted:
                waiting[at] = sample
        yield number, waiting.pop(number)
    count = order.shards.count(shard)
    if segment.end == count and any(at >= count for at, _ in samples):
        raise _other_count(order, shard, "more")


def _other_count(order: ShardOrder, shard: int, than: str) -> UserError:
    path, count = order.shards.paths[shard], order.shards.count(shard)
    return UserError(
        f"{path}: holds {than} samples than the {count:,} that it had before, or has in the sizes.json beside it; "
        "bring the shard back, or take that file away and begin the run anew (--overwrite)"
    )
