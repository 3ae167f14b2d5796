"""The train split of a run that reads tar shards sequentially."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from clip_retrieval.data.batches.train_split import EncodeFrozen
from clip_retrieval.data.pixels.jpeg import JpegTransform, check_decoder
from clip_retrieval.data.pixels.pixels import ImageTransform
from clip_retrieval.data.shards.find import find_shards
from clip_retrieval.data.shards.lanes import LaneReader, decode_sample
from clip_retrieval.data.shards.order import ShardOrder, Shards
from clip_retrieval.data.shards.remote import Url
from clip_retrieval.data.shards.samples import (
    SkipSample,
    check_layout,
    count_samples,
    read_sample_captions,
    read_samples,
)
from clip_retrieval.data.shards.sizes import SIZES, known_sizes
from clip_retrieval.data.shards.sources import Place
from clip_retrieval.data.shards.stream import StreamLoader
from clip_retrieval.data.workers import default_num_workers, map_in_workers
from clip_retrieval.distributed import Processes
from clip_retrieval.errors import UserError, format_count, format_counts, one_line
from clip_retrieval.log import log, progress_bar
from clip_retrieval.options import DataOptions

SHARDS_PER_WORKER = 4  # counting fewer is faster than starting a process
FIRST = 10  # samples of each shard after the first that are searched for a usable one


@dataclass
class StreamedTrainSplit:
    """A train split in shards.

    Attributes:
        split: "train", or UNSPLIT.
        shards: the shards.
        samples: pairs in an epoch, the dropped remainder included.
        transform: from an image to the model's input.
        tokenizer: the model's.
        num_workers: worker processes.
        options: the data options.
        seed: seed of the order.
    """

    split: str
    shards: Shards
    samples: int
    transform: ImageTransform | JpegTransform
    tokenizer: Any
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
        encode_frozen: EncodeFrozen | None,
    ) -> StreamLoader:
        """Make the loader of this process's part of the batches; frozen towers encode each batch again.

        Raises UserError if the processes cannot share the batches.
        """
        log.info(f"the shards are read as {format_count(sampler.lanes, 'parallel part')}")
        return StreamLoader(
            LaneReader(sampler, self.transform, self.options.caption_key),
            self.tokenizer,
            trim=trim,
            bucket=bucket,
            prefix=self.options.caption_prefix,
            num_workers=self.num_workers,
            device=device,
            processes=processes,
        )


def open_stream(
    options: DataOptions,
    seed: int,
    tokenizer: Any,
    preprocess: dict[str, Any],
    device: torch.device,
    processes: Processes,
) -> StreamedTrainSplit | None:
    """Find the shards of the train split, and count their samples unless an epoch's length is given.

    Raises UserError if a shard is missing or is not a complete tar, if the length of an epoch of remote shards is
    unknown, or if no usable sample is found in the first shard and the first samples of the others.
    """
    data = options.parts()[0]
    found = find_shards(data, "train")
    if found is None:
        return None
    workers = default_num_workers(device) if data.num_workers is None else data.num_workers
    sizes: Sequence[int | None] = known_sizes(found.paths)
    if (samples := data.train_num_samples) is None:
        sizes = counted = _count_unknown(found.paths, sizes, workers, processes)
        samples = sum(counted)
    log.info(f"{data.name} train: {format_counts(shard=len(sizes), pair=samples)} an epoch")
    check_decoder(data.decoder, device)
    settings: dict[str, Any] = {"augment": data.augment, "crop_scale": data.crop_scale}
    transform: ImageTransform | JpegTransform
    if data.decoder == "gpu":
        transform = JpegTransform(preprocess, **settings)
    else:
        transform = ImageTransform(preprocess, decoder=data.decoder, **settings)
    shards = Shards(found.paths, sizes)
    stream = StreamedTrainSplit(found.split, shards, samples, transform, tokenizer, workers, data, seed)
    _log_samples(stream, data)
    return stream


def _count_unknown(paths: list[Place], sizes: Sequence[int | None], workers: int, processes: Processes) -> list[int]:
    """Count the samples of each shard of unknown size; the processes share the work.

    Raises UserError for a remote shard, which would be downloaded to count.
    """
    unknown = [shard for shard, size in enumerate(sizes) if size is None]
    for path in (paths[shard] for shard in unknown):
        if isinstance(path, Url):
            raise UserError(
                f"{path}: the number of its samples is unknown; give --train_num_samples, or list the shard in "
                f"{path.beside(SIZES)} ({{file name: samples}})"
            )
    own = unknown[processes.rank :: processes.world_size]
    counts = torch.tensor([size or 0 for size in sizes] if processes.is_main else [0] * len(sizes))
    workers = min(workers, len(own) // SHARDS_PER_WORKER)
    found = map_in_workers(count_samples, [paths[shard] for shard in own], num_workers=workers)
    for shard, count in zip(own, progress_bar(found, total=len(own), desc="counting", leave=False), strict=True):
        counts[shard] = count
    return processes.sum(counts).tolist()


def _log_samples(stream: StreamedTrainSplit, data: DataOptions, number: int = 3) -> None:
    """Log a few captions, and whether images have several.

    Raises UserError if no sample of the first shard and none of the first samples of the others is usable.
    """
    check_layout(stream.shards.paths[0], data.caption_key)
    num_logged, has_several, problem = 0, False, ""
    # log the captions of the first usable samples
    for path, sample in _read_first_samples(stream.shards.paths):
        try:
            decode_sample(sample, path, stream.transform, data.caption_key, np.random.default_rng(0))
        except SkipSample as unusable:
            problem = problem or str(unusable)
            continue
        captions = read_sample_captions(sample, data.caption_key)
        log.info("  " + one_line(f"{sample['__key__']}: {captions[0]}"))
        has_several |= len(captions) > 1
        num_logged += 1
        if num_logged == number:
            break
    if not num_logged:
        raise UserError(problem or f"{stream.shards.paths[0]}: holds no images with captions")
    if has_several and data.caption_sampling == "all":
        log.info("  shards: one random caption per image and epoch, for any --caption_sampling")


def _read_first_samples(paths: Sequence[Place]) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Read all samples of the first shard, then the first FIRST of each other one."""
    for number, path in enumerate(paths):
        for sample in islice(read_samples(path), FIRST if number else None):
            yield path, sample
