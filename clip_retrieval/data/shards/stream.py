"""Training batches that are read from tar shards, one sample after the other, by worker processes.

A batch is the lanes' parts one after the other; a process computes some lanes, and each of its workers reads some of
these. The same image may be in a batch several times, as shards with a sample for each caption have it, or where a
sample stands in for one that cannot be used: all its captions belong to each, whichever processes compute them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from clip_retrieval.data.batches.loader import ToDevice, TrainBatch, text_length
from clip_retrieval.data.batches.skipped import SkipCounter
from clip_retrieval.data.captions import tokenize
from clip_retrieval.data.shards.lanes import LaneReader, Pair
from clip_retrieval.data.shards.order import ShardOrder
from clip_retrieval.data.workers import Workers
from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.errors import UserError


class LaneParts(NamedTuple):
    """Some lanes' part of a batch.

    Attributes:
        images: uint8 (n, 3, height, width).
        ids: int32 (n, context_length).
        lengths: int64 (n,), as in `captions.Tokens`.
        keys: int64 (n,), the images' `image_key`.
        cut: how many captions were longer than the context.
        left_out: the samples for which others stand in.
    """

    images: Tensor
    ids: Tensor
    lengths: Tensor
    keys: Tensor
    cut: int
    left_out: list[str]


class _FetchLanes:
    """Fetches the part of a batch that some lanes hold; goes on in shards that stand open where it can."""

    def __init__(self, read: LaneReader, tokenizer: Callable):
        self.read = read
        self.tokenizer = tokenizer
        self._open: dict[int, tuple[tuple[int, int], Iterator[tuple[Pair, str | None]]]] = {}

    def __call__(self, request: tuple[int, int, range]) -> LaneParts:
        epoch, batch, lanes = request
        found = [pair for lane in lanes for pair in self._pairs(epoch, batch, lane)]
        pairs = [pair for pair, _ in found]
        tokens = tokenize([pair.caption for pair in pairs], self.tokenizer)
        images, keys = torch.stack([pair.pixels for pair in pairs]), torch.tensor([pair.key for pair in pairs])
        left_out = [problem for _, problem in found if problem]
        return LaneParts(images, tokens.ids, tokens.lengths, keys, tokens.cut, left_out)

    def _pairs(self, epoch: int, batch: int, lane: int) -> list[tuple[Pair, str | None]]:
        share = self.read.order.lane_share
        at, pairs = self._open.pop(lane, (None, None))
        if at != (epoch, batch):
            pairs = self.read(epoch, lane, batch * share)
        found = list(islice(pairs, share))
        self._open[lane] = (epoch, batch + 1), pairs
        return found


class StreamLoader:
    """Training batches of one process, on its device, read from shards.

    Args:
        read: reads the pairs of a lane.
        tokenizer: the model's.
        trim: cut the padding that all captions of this process's part share (exact for causal and masked towers).
        bucket: cut to multiples of so many tokens: few lengths, for a compiled tower.
        num_workers: processes that load; no more than this process has lanes are used.
        processes: those that share a batch; this one computes its part of the lanes.

    Raises:
        UserError: the processes cannot share the lanes.
    """

    def __init__(
        self,
        read: LaneReader,
        tokenizer: Callable,
        *,
        trim: bool,
        num_workers: int,
        device: torch.device,
        processes: Processes = SINGLE_PROCESS,
        bucket: int = 1,
    ):
        self.order = read.order
        self.trim = trim
        self.bucket = bucket
        self.processes = processes
        own = lanes_of_process(self.order, processes)
        number = max(1, min(num_workers, len(own)))
        cuts = [own.start + len(own) * i // number for i in range(number + 1)]
        self._groups = [range(*cut) for cut in pairwise(cuts)]
        self._to_device = ToDevice(device)
        fetch = _FetchLanes(read, tokenizer)
        self._workers = Workers(fetch, num_workers=min(num_workers, number), pin_memory=self._to_device.pin_memory)
        self._next: tuple[int, int] | None = None
        self._skipped = SkipCounter("samples", processes, tokenizer.context_length)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[TrainBatch]:
        """The batches of an epoch, from batch number `first_batch` on; it may be broken off and gone on with.

        Raises UserError where a shard cannot be read.
        """
        if self._next != (epoch, first_batch):
            self._parts = self._workers(_requests(epoch, range(first_batch, len(self.order)), self._groups))
            self._skipped.begin(epoch, first_batch)
        for batch in range(first_batch, len(self.order)):
            parts = [next(self._parts) for _ in self._groups]
            self._next = epoch, batch + 1
            problems = [problem for part in parts for problem in part.left_out]
            self._skipped.count(problems, cut=sum(part.cut for part in parts))
            last = batch + 1 == len(self.order)
            if last:
                self._skipped.log_all()
            try:
                yield self._batch(parts)
            except GeneratorExit:
                if not last:
                    self._skipped.log_own()
                raise

    def _batch(self, parts: list[LaneParts]) -> TrainBatch:
        images, ids, lengths, keys, *_ = zip(*parts)
        ids, lengths = torch.cat(ids), torch.cat(lengths)
        texts = ids[:, : text_length(lengths, ids.shape[1], trim=self.trim, bucket=self.bucket)].long()
        everybodys = self.processes.all_gather(torch.cat(keys))
        positives = find_positives(everybodys, self.processes.rank * len(ids), len(ids))
        return self._to_device(list(images), texts, positives, lengths if self.bucket == 1 else None)


def find_positives(keys: Tensor, first: int, number: int) -> Tensor:
    """int64 (P, 2): all (i, j) for which keys[first + i] is keys[j], for i < number; sorted.

    keys is int64 (n,). No n x n matrix is made.
    """
    which = torch.unique(keys, return_inverse=True)[1]
    by_key, counts = torch.argsort(which, stable=True), torch.bincount(which)
    own = which[first : first + number]
    alike = counts[own]
    rows = torch.arange(number).repeat_interleave(alike)
    place_among = torch.arange(len(rows)) - (alike.cumsum(0) - alike)[rows]
    begin = (counts.cumsum(0) - counts)[own]
    return torch.stack([rows, by_key[begin[rows] + place_among]], dim=1)


def _requests(epoch: int, batches: range, groups: list[range]) -> Iterator[tuple[int, int, range]]:
    """One for each group of lanes, so that the workers, who are asked in turn, keep to the same lanes."""
    for batch in batches:
        for lanes in groups:
            yield epoch, batch, lanes


def lanes_of_process(order: ShardOrder, processes: Processes) -> range:
    """The lanes that this process reads: those of its slice of the batch.

    Raises UserError where the processes cannot share the lanes.
    """
    rank, world_size = processes.rank, processes.world_size
    if order.lanes % world_size:
        why = f" of {len(order.shards)} shards" if order.num_samples else ""
        mend = "leave --train_num_samples out, or bring more shards" if order.num_samples else "choose another one"
        raise UserError(
            f"--batch_size {order.batch_size}{why} is read in {order.lanes} parts at a time, which {world_size} "
            f"processes cannot share; {mend}, or a number of processes that divides {order.lanes}"
        )
    share = order.lanes // world_size
    return range(rank * share, (rank + 1) * share)
