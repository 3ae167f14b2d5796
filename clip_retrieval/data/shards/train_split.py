"""A train split that is read from tar shards: found, counted, looked into, and brought to a run in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip_retrieval.data.batches.train_split import EncodeFrozen
from clip_retrieval.data.pixels.pixels import ImageTransform
from clip_retrieval.data.shards.find import find_shards, known_sizes
from clip_retrieval.data.shards.lanes import LaneReader, decode_sample
from clip_retrieval.data.shards.order import ShardOrder, Shards
from clip_retrieval.data.shards.samples import Unusable, captions_of, check_layout, count_samples, read_samples
from clip_retrieval.data.shards.stream import StreamLoader
from clip_retrieval.data.workers import in_workers, usual_num_workers
from clip_retrieval.distributed import Processes
from clip_retrieval.errors import UserError, one_line
from clip_retrieval.log import log, progress_bar
from clip_retrieval.options import DataOptions

SHARDS_A_WORKER = 4  # fewer are counted faster than a process starts
FIRST = 10  # samples of a shard that is not worth reading whole, only to see what it holds


@dataclass
class StreamedTrainSplit:
    """A train split in shards.

    Attributes:
        split: "train", or UNSPLIT.
        shards: where the samples are.
        samples: pairs in an epoch, its dropped remainder included.
        transform: from an image to the model's input.
        tokenizer: the model's.
        num_workers: processes that load.
        options: of the data.
        seed: seed of the order.
    """

    split: str
    shards: Shards
    samples: int
    transform: ImageTransform
    tokenizer: Callable
    num_workers: int
    options: DataOptions
    seed: int

    def make_sampler(self, batch_size: int) -> ShardOrder:
        """Make the order in which the shards are read."""
        return ShardOrder(
            self.shards,
            batch_size,
            num_samples=self.options.train_num_samples,
            shuffle_buffer=self.options.shuffle_buffer,
            seed=self.seed,
        )

    def make_loader(
        self,
        sampler: ShardOrder,
        *,
        trim: bool,
        bucket: int,
        device: torch.device,
        processes: Processes,
        encode_frozen: EncodeFrozen,
    ) -> StreamLoader:
        """Make the loader of this process's part of the batches; a frozen tower encodes each batch anew.

        Raises UserError if the processes cannot share the batches.
        """
        log.info(f"the shards are read in {sampler.lanes} places at a time")
        return StreamLoader(
            LaneReader(sampler, self.transform, self.options.caption_key),
            self.tokenizer,
            trim=trim,
            bucket=bucket,
            num_workers=self.num_workers,
            device=device,
            processes=processes,
        )


def open_stream(
    options: DataOptions,
    seed: int,
    tokenizer: Callable,
    preprocess: dict[str, Any],
    device: torch.device,
    processes: Processes,
) -> StreamedTrainSplit | None:
    """Find the shards of the train split, and count their samples unless an epoch's length is given.

    Raises UserError where a shard is missing or no whole tar, or no sample can be used of those that are looked at.
    """
    data = options.parts()[0]
    found = find_shards(data, "train")
    if found is None:
        return None
    workers = usual_num_workers(device) if data.num_workers is None else data.num_workers
    sizes = known_sizes(found.paths)
    if (samples := data.train_num_samples) is None:
        sizes = _counted(found.paths, sizes, workers, processes)
        samples = sum(sizes)
    log.info(f"{data.name} train: {len(sizes):,} shards, {samples:,} pairs an epoch")
    transform = ImageTransform(preprocess, augment=data.augment, decoder=data.decoder)
    shards = Shards(found.paths, sizes)
    stream = StreamedTrainSplit(found.split, shards, samples, transform, tokenizer, workers, data, seed)
    _log_samples(stream, data)
    return stream


def _counted(paths: list[Path], sizes: list[int | None], workers: int, processes: Processes) -> list[int]:
    """Samples of each shard; the processes share the counting."""
    unknown = [shard for shard, size in enumerate(sizes) if size is None]
    own = unknown[processes.rank :: processes.world_size]
    counts = torch.tensor([size or 0 for size in sizes] if processes.is_main else [0] * len(sizes))
    workers = min(workers, len(own) // SHARDS_A_WORKER)
    found = in_workers(count_samples, [paths[shard] for shard in own], num_workers=workers)
    for shard, count in zip(own, progress_bar(found, total=len(own), desc="counting", leave=False), strict=True):
        counts[shard] = count
    return processes.sum(counts).tolist()


def _log_samples(stream: StreamedTrainSplit, data: DataOptions, number: int = 3) -> None:
    """Say a few captions, and whether there are several of an image.

    Raises UserError where none can be used of the first shard's samples and of those that the others begin with.
    """
    check_layout(stream.shards.paths[0], data.caption_key)
    said, several, problem = 0, False, ""
    for path, sample in _first_samples(stream.shards.paths):
        try:
            decode_sample(sample, path, stream.transform, data.caption_key, np.random.default_rng(0))
        except Unusable as unusable:
            problem = problem or str(unusable)
            continue
        captions = captions_of(sample, data.caption_key)
        log.info("  " + one_line(f"{sample['__key__']}: {captions[0]}"))
        several |= len(captions) > 1
        said += 1
        if said == number:
            break
    if not said:
        raise UserError(problem or f"{stream.shards.paths[0]}: holds no images with captions")
    if several and data.caption_sampling == "all":
        log.info("  shards give one caption of an image an epoch, drawn anew each time, whatever --caption_sampling is")


def _first_samples(paths: Sequence[Path]) -> Iterator[tuple[Path, dict[str, bytes]]]:
    """The samples of the first shard, then FIRST of each other one."""
    for number, path in enumerate(paths):
        for sample in islice(read_samples(path), FIRST if number else None):
            yield path, sample
