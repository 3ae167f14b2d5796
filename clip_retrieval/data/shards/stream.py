"""Training batches that worker processes read sequentially from tar shards.

A batch is the concatenation of the lanes' parts; a process computes some lanes, and each of its workers reads some of
these. An image may appear several times in a batch: shards may have one sample per caption, and a sample may replace an
unusable one. All captions of the image are positives of each appearance, also across processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clip_retrieval.data.batches.loader import ToDevice, TrainBatch, text_length
from clip_retrieval.data.batches.skipped import SkipCounter
from clip_retrieval.data.captions import tokenize
from clip_retrieval.data.pixels.jpeg import JpegBatch, JpegTransform, collate, decode_ahead
from clip_retrieval.data.shards.lanes import LaneReader, Pair
from clip_retrieval.data.shards.order import ShardOrder
from clip_retrieval.data.workers import Workers
from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.errors import UserError, format_counts


class LaneParts(NamedTuple):
    """The part of a batch that some lanes provide.

    Attributes:
        images: uint8 (n, 3, height, width), or files that the device decodes to that.
        ids: int32 (n, context_length).
        lengths: int64 (n,), as in `captions.Tokens`.
        keys: int64 (n,), the images' `image_key`.
        cut: number of captions longer than the context.
        replaced: the unusable samples that others replace, with their problems.
    """

    images: Tensor | JpegBatch
    ids: Tensor
    lengths: Tensor
    keys: Tensor
    cut: int
    replaced: list[str]


class _FetchLanes:
    """Fetches the part of a batch that some lanes provide; continues in its open shards if it can."""

    def __init__(self, read: LaneReader, tokenizer: Any, prefix: str | None):
        self.read = read
        self.tokenizer = tokenizer
        self.prefix = prefix
        self._open: dict[int, tuple[tuple[int, int], Iterator[tuple[Pair, str | None]]]] = {}

    def __call__(self, request: tuple[int, int, range]) -> LaneParts:
        epoch, batch, lanes = request
        found = [pair for lane in lanes for pair in self._read_pairs(epoch, batch, lane)]
        pairs = [pair for pair, _ in found]
        tokens = tokenize([pair.caption for pair in pairs], self.tokenizer, self.prefix)
        images, keys = collate([pair.pixels for pair in pairs]), torch.tensor([pair.key for pair in pairs])
        replaced = [problem for _, problem in found if problem]
        return LaneParts(images, tokens.ids, tokens.lengths, keys, tokens.cut, replaced)

    def _read_pairs(self, epoch: int, batch: int, lane: int) -> list[tuple[Pair, str | None]]:
        share = self.read.order.lane_share
        position, pairs = self._open.pop(lane, (None, iter(())))
        if position != (epoch, batch):
            pairs = self.read(epoch, lane, batch * share)
        found = list(islice(pairs, share))
        self._open[lane] = (epoch, batch + 1), pairs
        return found


def _decode_lanes(parts: LaneParts, device: torch.device) -> LaneParts:
    """Decode on the device; a sample that only proves unusable there is replaced too."""
    if not isinstance(parts.images, JpegBatch):
        return parts
    images, rows, problems = parts.images.decode(device)
    ids, lengths, keys = (tensor[rows] for tensor in (parts.ids, parts.lengths, parts.keys))
    return LaneParts(images, ids, lengths, keys, parts.cut, parts.replaced + problems)


class StreamLoader:
    """Training batches of one process, on its device, read from shards.

    Args:
        read: reads the pairs of a lane.
        tokenizer: the model's.
        trim: cut the padding that all captions of this process's part share (exact for causal and masked towers).
        bucket: cut to a multiple of this many tokens: a compiled tower needs few lengths.
        num_workers: worker processes, limited to the number of this process's lanes.
        device: device of the batches.
        processes: the processes that share a batch; this one computes its part of the lanes.
        prefix: text before every caption.

    Raises:
        UserError: the processes cannot share the lanes.
    """

    def __init__(
        self,
        read: LaneReader,
        tokenizer: Any,
        *,
        trim: bool,
        num_workers: int,
        device: torch.device,
        processes: Processes = SINGLE_PROCESS,
        bucket: int = 1,
        prefix: str | None = None,
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
        self._decodes_on_device = isinstance(read.transform, JpegTransform)
        fetch = _FetchLanes(read, tokenizer, prefix)
        self._workers = Workers(fetch, num_workers=min(num_workers, number), pin_memory=self._to_device.pin_memory)
        self._next: tuple[int, int] | None = None
        self._skipped = SkipCounter("samples", processes, tokenizer.context_length)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[TrainBatch]:
        """The batches of an epoch, from batch number `first_batch` on; it may be interrupted and resumed.

        Raises UserError if a shard cannot be read.
        """
        if self._next != (epoch, first_batch):
            self._parts = self._workers(_make_requests(epoch, range(first_batch, len(self.order)), self._groups))
            if self._decodes_on_device:
                self._parts = decode_ahead(
                    self._parts, partial(_decode_lanes, device=self._to_device.device), self._to_device.device
                )
            self._skipped.begin(epoch, first_batch)
        for batch in range(first_batch, len(self.order)):
            parts = [next(self._parts) for _ in self._groups]
            self._next = epoch, batch + 1
            problems = [problem for part in parts for problem in part.replaced]
            self._skipped.count(problems, cut=sum(part.cut for part in parts))
            last = batch + 1 == len(self.order)
            if last:
                self._skipped.log_all()
            try:
                yield self._make_batch(parts)
            except GeneratorExit:
                if not last:
                    self._skipped.log_own()
                raise

    def _make_batch(self, parts: list[LaneParts]) -> TrainBatch:
        ids, lengths = torch.cat([part.ids for part in parts]), torch.cat([part.lengths for part in parts])
        texts = ids[:, : text_length(lengths, ids.shape[1], trim=self.trim, bucket=self.bucket)].long()
        all_keys = self.processes.all_gather(torch.cat([part.keys for part in parts]))
        positives = find_positives(all_keys, self.processes.rank * len(ids), len(ids))
        return self._to_device([part.images for part in parts], texts, positives, lengths)


def find_positives(keys: Tensor, first: int, number: int) -> Tensor:
    """Find all pairs (i, j) with keys[first + i] == keys[j] and i < number: int64 (P, 2), sorted.

    keys is int64 (n,). No n x n matrix is made.
    """
    group = torch.unique(keys, return_inverse=True)[1]
    by_group, counts = torch.argsort(group, stable=True), torch.bincount(group)
    own = group[first : first + number]
    duplicates = counts[own]
    rows = torch.arange(number).repeat_interleave(duplicates)
    rank_in_group = torch.arange(len(rows)) - (duplicates.cumsum(0) - duplicates)[rows]
    begin = (counts.cumsum(0) - counts)[own]
    return torch.stack([rows, by_group[begin[rows] + rank_in_group]], dim=1)


def _make_requests(epoch: int, batches: range, groups: list[range]) -> Iterator[tuple[int, int, range]]:
    """Yield a request for each group of lanes. Workers get requests in turn, so each always reads the same lanes."""
    for batch in batches:
        for lanes in groups:
            yield epoch, batch, lanes


def lanes_of_process(order: ShardOrder, processes: Processes) -> range:
    """Return the lanes of this process: those of its slice of the batch.

    Raises UserError if the number of processes does not divide the number of lanes.
    """
    rank, world_size = processes.rank, processes.world_size
    if order.lanes % world_size:
        shards = f" of {format_counts(shard=len(order.shards))}" if order.num_samples else ""
        remedy = "omit --train_num_samples, add shards" if order.num_samples else "choose another one"
        raise UserError(
            f"--batch_size {order.batch_size}{shards}: {world_size} processes cannot share its {order.lanes} parallel "
            f"parts; {remedy}, or use a number of processes that divides {order.lanes}"
        )
    share = order.lanes // world_size
    return range(rank * share, (rank + 1) * share)
