"""Drop random words of training captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from clip_retrieval.data.batches.loader import Loader, TrainBatch
from clip_retrieval.distributed import SINGLE_PROCESS, Processes


class WordDropout:
    """A loader whose captions lose random tokens: words, but for rare ones, which have several tokens.

    The first and the last token of a caption, which mark start and end, stay. The draws are a function of seed, epoch,
    batch and row of the global batch.

    Args:
        loader: the loader of the whole captions.
        rate: the probability of a token to be dropped.
        pad: the id of the padding.
        seed: seed of the draws.
        processes: the processes that share a batch.
    """

    def __init__(self, loader: Loader, rate: float, *, pad: int, seed: int, processes: Processes = SINGLE_PROCESS):
        self.loader = loader
        self.rate = rate
        self.pad = pad
        self.seed = seed
        self.processes = processes

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[TrainBatch]:
        """The batches of an epoch, from batch number `first_batch` on."""
        for number, batch in enumerate(self.loader.epoch(epoch, first_batch), first_batch):
            rows, length = batch.texts.shape
            # one draw after the other position, so that the draws do not depend on the padding
            rng = np.random.default_rng((self.seed, epoch, number, 1))
            drawn = rng.random((length, rows * self.processes.world_size)).T
            drawn = drawn[rows * self.processes.rank :][:rows]
            assert batch.lengths is not None  # texts are no features: `make_frozen_encoder` leaves them
            texts, lengths = drop_tokens(batch.texts, batch.lengths, torch.from_numpy(drawn) < self.rate, self.pad)
            yield replace(batch, texts=texts, lengths=lengths)


def drop_tokens(ids: Tensor, lengths: Tensor, dropped: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Drop tokens of captions, and move the others together. The GPU does not wait.

    Args:
        ids: int64 (n, length), on the device.
        lengths: int64 (n,) on the CPU, number of ids without padding.
        dropped: bool (n, length) on the CPU; ignored for the first and last token of a caption, and for padding.
        pad: the id behind a caption.

    Returns:
        The ids, int64 (n, length), and their lengths.
    """
    position = torch.arange(ids.shape[1])
    kept = ~dropped | (position == 0) | (position >= lengths[:, None] - 1)
    order = kept.int().argsort(dim=1, descending=True, stable=True)
    is_padding = position >= kept.sum(1, keepdim=True)
    if ids.is_cuda:
        order, is_padding = (t.pin_memory().to(ids.device, non_blocking=True) for t in (order, is_padding))
    return ids.gather(1, order).masked_fill(is_padding, pad), lengths - (~kept).sum(1)
