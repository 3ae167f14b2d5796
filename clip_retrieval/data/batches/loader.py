"""Batches of images and tokens, prefetched by worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from clip_retrieval.data.batches.sampler import Batch, BatchSampler
from clip_retrieval.data.batches.skipped import SkipCounter
from clip_retrieval.data.captions import Tokens
from clip_retrieval.data.pixels.jpeg import JpegBatch, JpegFile, collate, decode_ahead
from clip_retrieval.data.pixels.pixels import Indices, Pixels, decodes_on_device
from clip_retrieval.data.workers import Workers, map_in_workers
from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.errors import UserError

IMAGES_PER_REQUEST = 64  # images that a worker loads at a time: several workers share a batch


@dataclass
class TrainBatch:
    """One process's part of a global batch, on its device.

    Attributes:
        images: uint8 (n, 3, height, width), or frozen features, float32 (n, width).
        texts: ids, int64 (n, length), trimmed to the longest caption of the global batch if that is exact, or frozen
            features, float32 (n, width).
        positives: int64 (P, 2), matching rows of this process's images and the global batch's captions.
        lengths: int64 (n,), on the CPU: the number of ids of each caption without padding; None if texts are features.
        text_rows: with negative captions, each caption is followed by its negative one, so texts and lengths have 2 n
            rows; int64 (m,), rows of the texts of all processes: the captions, then the negative ones. A caption
            without a negative one is repeated instead, and that row is left out. None without negative captions.
        rows: the numbers of the images and of the texts in the split, int64 (n,) and (texts,), on the CPU; None if it
            is streamed.
    """

    images: Tensor
    texts: Tensor
    positives: Tensor
    lengths: Tensor | None = None
    text_rows: Tensor | None = None
    rows: tuple[Tensor, Tensor] | None = None

    def part(self, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images, texts and lengths of some pairs."""
        texts = self.of_texts(rows)
        return self.images[rows], self.texts[texts], None if self.lengths is None else self.lengths[texts]

    def of_texts(self, rows: slice) -> slice:
        """The rows of `texts` of some pairs."""
        return rows if self.text_rows is None else slice(2 * rows.start, 2 * rows.stop)

    def select_texts(self, features: Tensor) -> Tensor:
        """Put features of the texts of all processes in the order of the loss: captions, then negative ones."""
        return features if self.text_rows is None else features.index_select(0, self.text_rows)


ReadablePixels = tuple[Tensor | JpegBatch, list[int], list[str]]
"""The images of n rows of a batch, the n rows whose images these are, and the problems of the unreadable ones."""


class _FetchPixels:
    """Fetches uint8 (n, 3, height, width) for image indices and the seeds of their crops."""

    def __init__(self, pixels: Pixels):
        self.pixels = pixels

    def __call__(self, request: tuple[Indices, Indices]) -> Tensor | JpegBatch:
        return self.pixels.batch(*request)


class _FetchReadablePixels:
    """Fetches the images of some rows of a global batch; replaces an unreadable image by the next readable row's.

    A request has the rows, and all images and seeds of the batch, so that replacements do not depend on its division.
    """

    def __init__(self, pixels: Pixels):
        self.pixels = pixels

    def __call__(self, request: tuple[range, np.ndarray, np.ndarray]) -> ReadablePixels:
        """The images, the n rows whose images these are, and the problems of the unreadable ones."""
        rows, indices, seeds = request
        try:
            return self.pixels.batch(indices[rows.start : rows.stop], seeds[rows.start : rows.stop]), list(rows), []
        except UserError:
            found = [self._read_next_readable(row, indices, seeds) for row in rows]
        images, used, problems = zip(*found)
        return collate(images), list(used), [problem for problem in problems if problem]

    def _read_next_readable(
        self, row: int, indices: np.ndarray, seeds: np.ndarray
    ) -> tuple[Tensor | JpegFile, int, str]:
        problem = ""
        for place in range(row, row + len(indices)):
            used = place % len(indices)
            try:
                return self.pixels(int(indices[used]), int(seeds[used])), used, problem
            except UserError as error:
                problem = problem or str(error)
        raise UserError(f"{problem}; no other image of its batch can be read either")


def _decode(images: Tensor | JpegBatch, device: torch.device) -> Tensor:
    return images.to(device) if isinstance(images, JpegBatch) else images


def _decode_readable(found: ReadablePixels, device: torch.device) -> ReadablePixels:
    """Decode on the device; an image that only proves unreadable there is replaced too."""
    images, rows, problems = found
    if not isinstance(images, JpegBatch):
        return found
    pixels, used, further = images.decode(device)
    return pixels, [rows[row] for row in used], problems + further


def image_batches(
    pixels: Pixels, batches: Iterable[range], *, num_workers: int, pin_memory: bool, skip_unreadable: bool = False
) -> Iterator[Tensor | JpegBatch]:
    """Yield the images of each range of indices: uint8 (n, 3, height, width), or files that become that on a device.

    Raises UserError for an unreadable image; with skip_unreadable, another one of its range replaces it.
    """
    shared: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
    if skip_unreadable:
        whole = ((range(len(own)), np.asarray(own), np.zeros(len(own), np.int64)) for own in batches)
        return (images for images, *_ in map_in_workers(_FetchReadablePixels(pixels), whole, **shared))
    requests = ((indices, [0] * len(indices)) for indices in batches)
    return map_in_workers(_FetchPixels(pixels), requests, **shared)


class ToDevice:
    """Moves a batch to the device; copies to a GPU overlap with its computation."""

    def __init__(self, device: torch.device):
        self.device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def pin_memory(self) -> bool:
        """Whether pinned memory speeds up the copies."""
        return self._copies is not None

    def __call__(
        self,
        image_parts: list[Any],
        texts: Tensor,
        positives: Tensor,
        lengths: Tensor | None,
        text_rows: Tensor | None = None,
    ) -> TrainBatch:
        """Make the batch on the device; its images are the concatenated parts, uint8 (n, 3, height, width) each."""
        if self._copies is None:
            images = torch.cat(image_parts) if len(image_parts) > 1 else image_parts[0]
            text_rows = None if text_rows is None else text_rows.to(self.device)
            texts, positives = texts.to(self.device), positives.to(self.device)
            return TrainBatch(images.to(self.device), texts, positives, lengths, text_rows)
        with torch.cuda.stream(self._copies):
            images = torch.cat([self._copy(part) for part in image_parts])
            texts, positives = self._copy(texts), self._copy(positives)
            text_rows = None if text_rows is None else self._copy(text_rows)
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(self._copies)
        for tensor in (images, texts, positives, text_rows):
            if tensor is not None:
                tensor.record_stream(compute)  # its memory must not be reused before the step is done
        return TrainBatch(images, texts, positives, lengths, text_rows)

    def _copy(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the GPU without blocking this process, unless the GPU decoded it."""
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(self.device))  # that of the copies
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


class Loader(Protocol):
    """Loads a process's training batches to its device."""

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[TrainBatch]:
        """The batches of an epoch, from batch number `first_batch` on. Raises UserError for unreadable data."""
        ...


class TrainLoader:
    """Training batches of one process, on its device.

    Args:
        sampler: the global batches.
        images: the pixels, or frozen features of all images, float32 (images, width).
        texts: the captions' ids, or frozen features of all captions, float32 (captions, width).
        trim: cut the padding that all captions of a batch share (exact for causal and masked text towers).
        bucket: cut to a multiple of this many tokens: a compiled tower needs few lengths.
        share: this process's part of a global batch.
        num_workers: worker processes.
        device: device of the batches.
        processes: the processes that share a batch.
        skip_unreadable: replace a pair with an unreadable image by another pair of the batch instead of stopping.
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
        self.skips_unreadable = skip_unreadable
        self._skipped = SkipCounter("images", processes) if skip_unreadable else None
        self._decode: Callable[[Any], Any] | None = None
        if not isinstance(images, Tensor):
            if decodes_on_device(images):
                self._decode = partial(_decode_readable if skip_unreadable else _decode, device=device)
            fetch = _FetchReadablePixels(images) if skip_unreadable else _FetchPixels(images)
            self._workers = Workers(fetch, num_workers=num_workers, pin_memory=self._to_device.pin_memory)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[TrainBatch]:
        """The batches of an epoch, from batch number `first_batch` on. Raises UserError for an unreadable image."""
        # frozen features: nothing to load
        batches = self.sampler.epoch(epoch, first_batch)
        if isinstance(self.images, Tensor):
            for batch in batches:
                yield self._make_batch(batch, [self.images[torch.from_numpy(batch.images[self.share])]])
            return
        # request the parts of each batch from the workers
        pending: list[tuple[Batch, int]] = []
        requests = _make_requests(self.sampler, self.share, epoch, first_batch, pending, whole=bool(self._skipped))
        parts = self._workers(requests)
        if self._decode is not None:
            parts = decode_ahead(parts, self._decode, self._to_device.device)
        if self._skipped:
            self._skipped.begin(epoch, first_batch)
        for batch_number, part in enumerate(parts, first_batch):
            batch, number = pending.pop(0)
            found = [part, *(next(parts) for _ in range(number - 1))]
            if not self._skipped:
                yield self._make_batch(batch, found)
                continue
            # replace the pairs of unreadable images, and count them
            rows = [row for _, part_rows, _ in found for row in part_rows]
            self._skipped.count([problem for *_, problems in found for problem in problems])
            last = batch_number + 1 == len(self.sampler)
            if last:
                self._skipped.log_all()
            try:
                yield self._make_batch(self._take_rows(batch, rows), [images for images, *_ in found])
            except GeneratorExit:
                if not last:
                    self._skipped.log_own()
                raise

    def _take_rows(self, batch: Batch, own_rows: list[int]) -> Batch:
        """Take the rows that the processes read, `own_rows` in this one: pairs of unreadable images are replaced."""
        rows = self.processes.all_gather(torch.tensor(own_rows)).numpy()
        negatives = None if batch.negatives is None else batch.negatives[rows]
        return Batch(batch.images[rows], batch.captions[rows], negatives)

    def _make_batch(self, batch: Batch, image_parts: list[Tensor]) -> TrainBatch:
        rows, text_rows = batch.captions[:, None], None
        if batch.negatives is not None:
            has_one = batch.negatives >= 0
            rows = np.stack([batch.captions, np.where(has_one, batch.negatives, batch.captions)], axis=1)
            text_rows = torch.from_numpy(np.flatnonzero(np.stack([np.ones_like(has_one), has_one])))
            text_rows = text_rows % len(has_one) * 2 + text_rows // len(has_one)
        captions, own = torch.from_numpy(rows.ravel()), torch.from_numpy(rows[self.share].ravel())
        lengths = None
        if isinstance(self.texts, Tensor):
            texts = self.texts[own]
        else:
            context_length = self.texts.ids.shape[1]
            needed = text_length(self.texts.lengths[captions], context_length, trim=self.trim, bucket=self.bucket)
            texts = self.texts.ids[own, :needed].long()
            lengths = self.texts.lengths[own]
        positives = torch.from_numpy(self.sampler.dataset.positives(batch.images[self.share], batch.captions))
        own_rows = torch.from_numpy(batch.images)[self.share], own
        return replace(self._to_device(image_parts, texts, positives, lengths, text_rows), rows=own_rows)


def text_length(lengths: Tensor, context_length: int, *, trim: bool, bucket: int) -> int:
    """Return the length for a batch of captions, a multiple of `bucket`; without `trim`, the context length."""
    if not trim:
        return context_length
    return min(-(-int(lengths.max()) // bucket) * bucket, context_length)


def _make_requests(
    sampler: BatchSampler,
    share: slice,
    epoch: int,
    first_batch: int,
    pending: list[tuple[Batch, int]],
    *,
    whole: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray] | tuple[range, np.ndarray, np.ndarray]]:
    """Yield the image indices and seeds of a part of a batch; append each batch and its number of parts to `pending`.

    With whole=True, yield the rows of the part, and the indices and seeds of the whole batch.
    """
    for number, batch in enumerate(sampler.epoch(epoch, first_batch), first_batch):
        rng = np.random.default_rng((sampler.seed, epoch, number))
        seeds = rng.integers(2**63, size=len(batch.images))
        rows = range(len(batch.images))[share]
        parts = [rows[start : start + IMAGES_PER_REQUEST] for start in range(0, len(rows), IMAGES_PER_REQUEST)]
        pending.append((batch, len(parts)))
        for part in parts:
            own = slice(part.start, part.stop)
            yield (part, batch.images, seeds) if whole else (batch.images[own], seeds[own])
