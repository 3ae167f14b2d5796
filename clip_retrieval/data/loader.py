"""Batches of images and tokens, loaded ahead by worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from clip_retrieval.data.captions import Tokens
from clip_retrieval.data.dataset import Images
from clip_retrieval.data.images import ImageArray
from clip_retrieval.data.preprocess import CropTransform, evaluation_transform
from clip_retrieval.data.sampler import BatchSampler
from clip_retrieval.errors import LOST_WORKER, RunError, UserError
from clip_retrieval.signals import outlive_first_signal


@dataclass
class TrainBatch:
    """What one process computes of a global batch, and the positives of that part.

    Attributes:
        images: uint8 (n, 3, height, width).
        tokens: int64 (n, length), cut to the longest caption of the global batch where `trim` allows it.
        positives: bool (n, n), image i and caption j belong together.
    """

    images: torch.Tensor
    tokens: torch.Tensor
    positives: torch.Tensor

    def to(self, device: torch.device) -> TrainBatch:
        """Copied to `device`, without waiting for the copy where the memory is pinned."""
        return TrainBatch(*(t.to(device, non_blocking=True) for t in (self.images, self.tokens, self.positives)))

    def pin_memory(self) -> TrainBatch:
        return TrainBatch(*(t.pin_memory() for t in (self.images, self.tokens, self.positives)))


class _Failed:
    """An error from a worker, carried to the main process whole (the loader would bury it in a traceback)."""

    def __init__(self, error: UserError):
        self.message = str(error)

    def pin_memory(self) -> _Failed:
        return self


class _TrainSamples(Dataset):
    """Fetches what one process computes of a global batch; runs in a worker."""

    def __init__(self, sampler: BatchSampler, tokens: Tokens, trim: bool, preprocess: dict, augment: str, share: slice):
        self.sampler = sampler
        self.tokens = tokens
        self.trim = trim
        self.crop = CropTransform(preprocess) if augment == "crop" else None
        self.resize = evaluation_transform(preprocess)
        self.share = share

    def __getitem__(self, request) -> TrainBatch | _Failed:
        batch, seeds = request
        dataset = self.sampler.dataset
        images, captions = batch.images[self.share], batch.captions[self.share]
        try:
            pixels = [
                self.crop(dataset.images[i], seed) if self.crop else self.resize(dataset.images[i])
                for i, seed in zip(images, seeds[self.share])
            ]
        except UserError as error:
            return _Failed(error)
        length = int(self.tokens.lengths[batch.captions].max()) if self.trim else None
        return TrainBatch(
            images=torch.stack(pixels),
            tokens=self.tokens.ids[captions, :length].long(),
            positives=torch.from_numpy(dataset.positives(images, captions)),
        )


class _Requests:
    """What the workers are asked for, batch after batch: the batch, and a seed per sample for its random crop."""

    def __init__(self, sampler: BatchSampler):
        self.sampler = sampler
        self.epoch = 0
        self.first_batch = 0

    def __len__(self) -> int:
        return len(self.sampler) - self.first_batch

    def __iter__(self) -> Iterator:
        for number, batch in enumerate(self.sampler.epoch(self.epoch, self.first_batch), self.first_batch):
            rng = np.random.default_rng((self.sampler.seed, self.epoch, number))
            yield batch, rng.integers(2**63, size=len(batch.images))


class TrainLoader:
    """Training batches of one process.

    Args:
        sampler: the global batches.
        tokens: the captions' ids.
        trim: cut the padding that all captions of a batch share (exact for causal and masked text towers).
        preprocess: open_clip's preprocessing, as a dict.
        augment: "none" or "crop".
        share: the part of a global batch that this process computes.
        num_workers: processes that load.
        pin_memory: prepare the batches for quick copies to a GPU.
    """

    def __init__(
        self,
        sampler: BatchSampler,
        tokens: Tokens,
        *,
        trim: bool,
        preprocess: dict,
        augment: str,
        share: slice,
        num_workers: int,
        pin_memory: bool,
    ):
        self._requests = _Requests(sampler)
        self._loader = DataLoader(
            _TrainSamples(sampler, tokens, trim, preprocess, augment, share),
            sampler=self._requests,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=outlive_first_signal,
            generator=torch.Generator(),  # its own: loading must not move the random state that training uses
        )

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[TrainBatch]:
        """The batches of an epoch, from batch number `first_batch` on. Raises UserError for a broken image."""
        self._requests.epoch, self._requests.first_batch = epoch, first_batch
        return _unless_failed(self._loader)


class _AllImages(Dataset):
    def __init__(self, images: Images, preprocess: dict):
        self.images = images
        self.resize = evaluation_transform(preprocess)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> torch.Tensor | _Failed:
        try:
            return torch.stack([self.resize(self.images[i]) for i in indices])
        except UserError as error:
            return _Failed(error)


def image_batches(images: Images, preprocess: dict, *, batch_size: int, num_workers: int, pin_memory: bool):
    """Yield uint8 (n, 3, height, width) of all images, in order. Raises UserError for a broken image."""
    loader = DataLoader(
        _AllImages(images, preprocess),
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_as_it_is,
        worker_init_fn=outlive_first_signal,
        generator=torch.Generator(),
    )
    return _unless_failed(loader)


def _as_it_is(batch):
    return batch


def _unless_failed(loader: DataLoader) -> Iterator:
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError) as error:
            raise RunError(LOST_WORKER) from error
        if isinstance(batch, _Failed):
            raise UserError(batch.message)
        yield batch


def choose_num_workers(asked: int | None, images: Images, device: torch.device) -> int:
    """`asked`, or what suits the images and the device: none where the images are in memory already."""
    if asked is not None:
        return asked
    if isinstance(images, ImageArray):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # On a CPU, loading and computing share the cores.
    return min(16, cores) if device.type != "cpu" else min(8, max(1, cores // 2))
