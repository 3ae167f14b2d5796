"""Batches of images and tokens, loaded ahead by worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from clip_retrieval.data.batches.sampler import Batch, BatchSampler
from clip_retrieval.data.batches.skipped import SkipCounter
from clip_retrieval.data.captions import Tokens
from clip_retrieval.data.pixels.pixels import Pixels
from clip_retrieval.data.workers import Workers, in_workers
from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.errors import UserError

IMAGES_PER_REQUEST = 64  # images that a worker loads at a time: several work on one batch


@dataclass
class TrainBatch:
    """What one process computes of a global batch, on its device.

    Attributes:
        images: uint8 (n, 3, height, width), or what a frozen image tower gave for them, float32 (n, width).
        texts: int64 (n, length), cut to the longest caption of the global batch where that is exact, or what a
            frozen text tower gave for them, float32 (n, width).
        positives: int64 (P, 2), rows of this process's images and of the global batch's captions that belong
            together.
        lengths: int64 (n,), on the CPU: how many ids of a caption are no padding. None where texts are no ids, or
            a compiled tower wants few sizes.
    """

    images: Tensor
    texts: Tensor
    positives: Tensor
    lengths: Tensor | None = None


class _PixelsOfMany:
    """Fetches uint8 (n, 3, height, width) of image indices and the seeds of their crops."""

    def __init__(self, pixels: Pixels):
        self.pixels = pixels

    def __call__(self, request: tuple[Sequence[int], Sequence[int]]) -> Tensor:
        return self.pixels.batch(*request)


class _PixelsOfReadable:
    """Fetches the images of some rows of a global batch; for one that cannot be read the next row that can stands in.

    Given are the rows, and all images and seeds of the batch: who stands in does not depend on how it is split up.
    """

    def __init__(self, pixels: Pixels):
        self.pixels = pixels

    def __call__(self, request: tuple[range, np.ndarray, np.ndarray]) -> tuple[Tensor, list[int], list[str]]:
        """uint8 (n, 3, height, width), the n rows that they are, and what keeps the others from being read."""
        rows, indices, seeds = request
        try:
            return self.pixels.batch(indices[rows.start : rows.stop], seeds[rows.start : rows.stop]), list(rows), []
        except UserError:
            found = [self._readable(row, indices, seeds) for row in rows]
        images, used, problems = zip(*found)
        return torch.stack(images), list(used), [problem for problem in problems if problem]

    def _readable(self, row: int, indices: np.ndarray, seeds: np.ndarray) -> tuple[Tensor, int, str]:
        problem = ""
        for place in range(row, row + len(indices)):
            used = place % len(indices)
            try:
                return self.pixels(int(indices[used]), int(seeds[used])), used, problem
            except UserError as error:
                problem = problem or str(error)
        raise UserError(f"{problem}; nor can any other image of its batch")


def image_batches(pixels: Pixels, batches: Iterable[range], *, num_workers: int, pin_memory: bool) -> Iterator[Tensor]:
    """Yield uint8 (n, 3, height, width) for each range of image indices. Raises UserError for a broken image."""
    requests = ((indices, [0] * len(indices)) for indices in batches)
    return in_workers(_PixelsOfMany(pixels), requests, num_workers=num_workers, pin_memory=pin_memory)


class ToDevice:
    """Puts the parts of a batch on the device; copies to a GPU run beside its computing."""

    def __init__(self, device: torch.device):
        self.device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def pin_memory(self) -> bool:
        """Whether tensors are copied more quickly from pinned memory."""
        return self._copies is not None

    def __call__(
        self, image_parts: Sequence[Tensor], texts: Tensor, positives: Tensor, lengths: Tensor | None
    ) -> TrainBatch:
        """The batch whose images stand in these parts, one after the other."""
        if self._copies is None:
            images = torch.cat(image_parts) if len(image_parts) > 1 else image_parts[0]
            return TrainBatch(*(tensor.to(self.device) for tensor in (images, texts, positives)), lengths)
        with torch.cuda.stream(self._copies):
            images = torch.cat([self._copied(part) for part in image_parts])
            texts, positives = self._copied(texts), self._copied(positives)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._copies)
        for tensor in (images, texts, positives):
            tensor.record_stream(computing)  # its memory is not given away before the step has used it
        return TrainBatch(images, texts, positives, lengths)

    def _copied(self, tensor: Tensor) -> Tensor:
        """On the GPU; the copy does not keep this process waiting."""
        return tensor.pin_memory().to(self.device, non_blocking=True)


class Loader(Protocol):
    """Gives a process its training batches, on its device."""

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[TrainBatch]:
        """The batches of an epoch, from batch number `first_batch` on. Raises UserError where data are broken."""
        ...


class TrainLoader:
    """Training batches of one process, on its device.

    Args:
        sampler: the global batches.
        images: the pixels, or float32 (images, width) that a frozen image tower gave for all of them.
        texts: the captions' ids, or float32 (captions, width) that a frozen text tower gave for all of them.
        trim: cut the padding that all captions of a batch share (exact for causal and masked text towers).
        bucket: cut to multiples of so many tokens: few lengths, for a compiled tower.
        share: the part of a global batch that this process computes.
        num_workers: processes that load.
        processes: those that share a batch.
        pass_over: go on where an image cannot be read: another pair of the batch stands in, and is there twice.
    """

    def __init__(
        self,
        sampler: BatchSampler,
        images: Pixels | Tensor,
        texts: Tokens | Tensor,
        *,
        trim: bool,
        share: slice,
        num_workers: int,
        device: torch.device,
        bucket: int = 1,
        processes: Processes = SINGLE_PROCESS,
        skip_unreadable: bool = False,
    ):
        self.sampler = sampler
        self.images = images
        self.texts = texts
        self.trim = trim
        self.bucket = bucket
        self.share = share
        self._to_device = ToDevice(device)
        self.processes = processes
        self._skipped = SkipCounter("images", processes) if skip_unreadable else None
        if not isinstance(images, Tensor):
            fetch = _PixelsOfReadable(images) if skip_unreadable else _PixelsOfMany(images)
            self._workers = Workers(fetch, num_workers=num_workers, pin_memory=self._to_device.pin_memory)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[TrainBatch]:
        """The batches of an epoch, from batch number `first_batch` on. Raises UserError for a broken image."""
        batches = self.sampler.epoch(epoch, first_batch)
        if isinstance(self.images, Tensor):
            for batch in batches:
                yield self._batch(batch, [self.images[torch.from_numpy(batch.images[self.share])]])
            return
        asked: list[tuple[Batch, int]] = []
        requests = _part_requests(self.sampler, self.share, epoch, first_batch, asked, whole=bool(self._skipped))
        parts = self._workers(requests)
        if self._skipped:
            self._skipped.begin(epoch, first_batch)
        for batch_number, part in enumerate(parts, first_batch):
            batch, number = asked.pop(0)
            found = [part, *(next(parts) for _ in range(number - 1))]
            if not self._skipped:
                yield self._batch(batch, found)
                continue
            rows = [row for _, part_rows, _ in found for row in part_rows]
            self._skipped.count([problem for *_, problems in found for problem in problems])
            last = batch_number + 1 == len(self.sampler)
            if last:
                self._skipped.log_all()
            try:
                yield self._batch(self._as_read(batch, rows), [images for images, *_ in found])
            except GeneratorExit:
                if not last:
                    self._skipped.log_own()
                raise

    def _as_read(self, batch: Batch, own_rows: list[int]) -> Batch:
        """The batch in which others stand in for what cannot be read; `own_rows` are those that this process read."""
        rows = self.processes.all_gather(torch.tensor(own_rows)).numpy()
        return replace(batch, images=batch.images[rows], captions=batch.captions[rows])

    def _batch(self, batch: Batch, image_parts: list[Tensor]) -> TrainBatch:
        captions = torch.from_numpy(batch.captions)
        lengths = None
        if isinstance(self.texts, Tensor):
            texts = self.texts[captions[self.share]]
        else:
            context_length = self.texts.ids.shape[1]
            needed = text_length(self.texts.lengths[captions], context_length, trim=self.trim, bucket=self.bucket)
            texts = self.texts.ids[captions[self.share], :needed].long()
            if self.bucket == 1:
                lengths = self.texts.lengths[captions[self.share]]
        positives = torch.from_numpy(self.sampler.dataset.positives(batch.images[self.share], batch.captions))
        return self._to_device(image_parts, texts, positives, lengths)


def text_length(lengths: Tensor, context_length: int, *, trim: bool, bucket: int) -> int:
    """Tokens that captions of these lengths need, as a multiple of `bucket`; without `trim` the whole context."""
    if not trim:
        return context_length
    return min(-(-int(lengths.max()) // bucket) * bucket, context_length)


def _part_requests(
    sampler: BatchSampler,
    share: slice,
    epoch: int,
    first_batch: int,
    asked: list[tuple[Batch, int]],
    *,
    whole: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray] | tuple[range, np.ndarray, np.ndarray]]:
    """Image indices and seeds, a few at a time; notes in `asked` each batch and the number of its parts.

    Or the rows of a few, and the indices and seeds of the `whole` batch.
    """
    for number, batch in enumerate(sampler.epoch(epoch, first_batch), first_batch):
        rng = np.random.default_rng((sampler.seed, epoch, number))
        seeds = rng.integers(2**63, size=len(batch.images))
        rows = range(len(batch.images))[share]
        parts = [rows[start : start + IMAGES_PER_REQUEST] for start in range(0, len(rows), IMAGES_PER_REQUEST)]
        asked.append((batch, len(parts)))
        for part in parts:
            chosen = slice(part.start, part.stop)
            yield (part, batch.images, seeds) if whole else (batch.images[chosen], seeds[chosen])
