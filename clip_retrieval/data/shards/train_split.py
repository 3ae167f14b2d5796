"""A train split that is read from tar shards: found, counted, looked into, and brought to a run in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import DataOptions, Options

SHARDS_A_WORKER = 4  # fewer are counted faster than a process starts
FIRST = 10  # samples of a shard that is not worth reading whole, only to see what it holds


@dataclass
class StreamedSplit:
    """A train split in shards.

    Attributes:
        split: "train", or UNSPLIT.
        shards: where the samples are.
        samples: pairs in an epoch, its dropped remainder included.
        transform: what the model sees of an image.
        tokenizer: the model's.
        num_workers: processes that load.
    """

    split: str
    shards: Shards
    samples: int
    transform: ImageTransform
    tokenizer: Callable
    num_workers: int


def open_stream(
    options: Options, tokenizer: Callable, preprocess: dict[str, Any], device: torch.device, processes: Processes
) -> StreamedSplit | None:
    """Find the shards of the train split, and count their samples unless an epoch's length is given.

    Raises UserError where a shard is missing or no whole tar, or no sample can be used of those that are looked at.
    """
    data = options.data.parts()[0]
    found = find_shards(data, "train")
    if found is None:
        return None
    workers = usual_num_workers(device) if data.num_workers is None else data.num_workers
    sizes = known_sizes(found.paths)
    if (samples := data.train_num_samples) is None:
        sizes = _counted(found.paths, sizes, workers, processes)
        samples = sum(sizes)
    log.info(f"{data.dataset} train: {len(sizes):,} shards, {samples:,} pairs an epoch")
    transform = ImageTransform(preprocess, augment=data.augment, decoder=data.decoder)
    stream = StreamedSplit(found.split, Shards(found.paths, sizes), samples, transform, tokenizer, workers)
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


def _log_samples(stream: StreamedSplit, data: DataOptions, number: int = 3) -> None:
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


def make_order(options: Options, stream: StreamedSplit, batch_size: int) -> ShardOrder:
    """The order in which a run reads the shards."""
    return ShardOrder(
        stream.shards,
        batch_size,
        num_samples=options.data.train_num_samples,
        shuffle_buffer=options.data.shuffle_buffer,
        seed=options.train.seed,
    )


def make_stream_loader(
    options: Options,
    model: RetrievalModel,
    stream: StreamedSplit,
    order: ShardOrder,
    device: torch.device,
    processes: Processes,
    *,
    bucket: int,
) -> StreamLoader:
    """This process's part of the batches. Raises UserError where the processes cannot share them."""
    log.info(f"the shards are read in {order.lanes} places at a time")
    return StreamLoader(
        LaneReader(order, stream.transform, options.data.caption_key),
        stream.tokenizer,
        trim=model.trims_text,
        bucket=bucket,
        num_workers=stream.num_workers,
        device=device,
        processes=processes,
    )
