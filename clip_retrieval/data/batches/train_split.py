"""The train split of a run: its samples, and the order and loader of its batches.

There are two kinds: `IndexedTrainSplit` reads samples in any order; `data.shards.train_split.StreamedTrainSplit` reads
tar shards sequentially.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from clip_retrieval.data.batches.loader import Loader, TrainLoader
from clip_retrieval.data.batches.sampler import BatchSampler, Sampler, number_of_samples, process_slice
from clip_retrieval.data.batches.split import Split
from clip_retrieval.data.captions import Tokens
from clip_retrieval.data.pixels.pixels import Pixels, choose_num_workers
from clip_retrieval.distributed import Processes
from clip_retrieval.errors import format_counts
from clip_retrieval.log import log

EncodeFrozen = Callable[[Split, int], tuple[Pixels | Tensor, Tokens | Tensor]]
"""encode_frozen(split, num_workers) returns the images and the captions, as features of the towers that are frozen."""


class TrainSplit(Protocol):
    """A train split."""

    @property
    def split(self) -> str:
        """Name of the split: "train", or UNSPLIT for a data set without splits."""
        ...

    @property
    def samples(self) -> int:
        """Pairs in an epoch, the dropped remainder included."""
        ...

    def make_sampler(self, batch_size: int) -> Sampler:
        """Make the sampler of the global batches."""
        ...

    def make_loader(
        self,
        sampler: Any,
        *,
        trim: bool,
        bucket: int,
        device: torch.device,
        processes: Processes,
        encode_frozen: EncodeFrozen | None,
    ) -> Loader:
        """Make the loader of this process's part of the batches. See `TrainLoader` for the arguments."""
        ...


@dataclass(frozen=True)
class IndexedTrainSplit:
    """A train split whose samples are read in any order.

    Attributes:
        data: the split.
        sampling: "all" captions once an epoch, or "one" of each image.
        seed: seed of the order.
        weights: of the parts of a mixture; see `BatchSampler`.
        num_workers: worker processes; None: chosen by the device.
        plain_pixels: the images as an evaluation sees them.
        hard_negatives: share and side of the near neighbours in a batch; see `BatchSampler`.
        skip_unreadable: replace an unreadable image by another one of the batch instead of stopping.
    """

    data: Split
    sampling: str
    seed: int
    plain_pixels: Pixels
    weights: Sequence[float] | None = None
    num_workers: int | None = None
    hard_negatives: tuple[float, str] | None = None
    skip_unreadable: bool = False

    @property
    def split(self) -> str:
        return self.data.dataset.split

    @property
    def samples(self) -> int:
        return number_of_samples(self.data.dataset, self.sampling)

    def make_sampler(self, batch_size: int) -> BatchSampler:
        dataset = self.data.dataset
        sampler = BatchSampler(dataset, batch_size, self.sampling, self.seed, self.weights, self.hard_negatives)
        if self.weights:
            shares = (f"{share:,} of {part.name}" for share, part in zip(sampler.shares, dataset.parts))
            log.info(f"an epoch's {format_counts(pair=self.samples)}: {', '.join(shares)}")
        return sampler

    def make_loader(
        self,
        sampler: BatchSampler,
        *,
        trim: bool,
        bucket: int,
        device: torch.device,
        processes: Processes,
        encode_frozen: EncodeFrozen | None,
    ) -> TrainLoader:
        num_workers = choose_num_workers(self.num_workers, self.data.pixels, device)
        images: Pixels | Tensor = self.data.pixels
        texts: Tokens | Tensor = self.data.tokens
        if encode_frozen is not None:
            images, texts = encode_frozen(self.data, num_workers)
        return TrainLoader(
            sampler,
            images,
            texts,
            trim=trim,
            bucket=bucket,
            share=process_slice(sampler.batch_size, processes.rank, processes.world_size),
            num_workers=num_workers,
            device=device,
            processes=processes,
            skip_unreadable=self.skip_unreadable,
        )
