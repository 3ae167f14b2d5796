"""Word dropout: which tokens go, and that the draws depend on seed, epoch, batch and global row only."""

import numpy as np
import pytest
import torch

from clip_retrieval.data.batches.loader import TrainBatch
from clip_retrieval.data.batches.word_dropout import WordDropout, drop_tokens
from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from tests.models.small import EOT, SOT, token_ids

LENGTHS = torch.tensor([16, 9, 3, 2, 12, 5])


class Batches:
    """A loader of the same captions in each batch, of one process's share of them."""

    def __init__(self, processes=SINGLE_PROCESS, columns=16):
        share = len(LENGTHS) // processes.world_size
        self.rows = slice(processes.rank * share, (processes.rank + 1) * share)
        self.ids = token_ids(LENGTHS.tolist())[self.rows, :columns]

    def epoch(self, epoch, first_batch=0):
        for _ in range(first_batch, 3):
            yield TrainBatch(torch.zeros(0), self.ids, torch.zeros(0, 2), LENGTHS[self.rows])


def texts(rate=0.4, seed=3, epoch=0, first_batch=0, processes=SINGLE_PROCESS):
    loader = WordDropout(Batches(processes), rate, pad=0, seed=seed, processes=processes)
    return [batch.texts for batch in loader.epoch(epoch, first_batch)]


def test_dropped_tokens_leave_no_gap():
    ids, rng = token_ids(LENGTHS.tolist()), np.random.default_rng(0)
    dropped = torch.from_numpy(rng.random(ids.shape) < 0.5)
    found, lengths = drop_tokens(ids, LENGTHS, dropped, pad=7)
    for row, length in enumerate(LENGTHS.tolist()):
        kept = [ids[row, k].item() for k in range(length) if k in (0, length - 1) or not dropped[row, k]]
        assert found[row].tolist() == kept + found[row, len(kept) :].tolist()
        assert lengths[row] == len(kept) and set(found[row, len(kept) :].tolist()) <= {0, 7}
        assert found[row, 0] == SOT and found[row, len(kept) - 1] == EOT


def test_share_of_dropped_words_is_the_rate():
    ids, lengths = token_ids([16] * 500), torch.full((500,), 16)
    dropped = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    assert (16 - drop_tokens(ids, lengths, dropped, 0)[1]).double().mean() / 14 == pytest.approx(0.3, abs=0.01)


def test_draws_are_a_function_of_seed_epoch_and_batch():
    whole = texts()
    assert all(torch.equal(a, b) for a, b in zip(texts(first_batch=1), whole[1:], strict=True))
    for other in (whole[1], texts(epoch=1)[0], texts(seed=4)[0]):
        assert not torch.equal(whole[0], other)


def test_draws_depend_neither_on_processes_nor_on_the_padding():
    shares = [texts(processes=Processes(rank, 2)) for rank in range(2)]
    for whole, *parts in zip(texts(), *shares, strict=True):
        assert torch.equal(torch.cat(parts), whole)
    loader = WordDropout(Batches(), 0.4, pad=0, seed=3)
    loader.loader.ids = torch.nn.functional.pad(loader.loader.ids, (0, 5))
    for longer, whole in zip(loader.epoch(0), texts(), strict=True):
        assert torch.equal(longer.texts[:, :16], whole)
