"""Batches: every pair once, no image twice if avoidable, the same for any number of processes."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_retrieval.data.batches.sampler import BatchSampler, process_slice
from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.image_files import ImageArray
from clip_retrieval.data.negatives import Negatives
from clip_retrieval.errors import UserError


def dataset(captions_per_image):
    images = np.repeat(np.arange(len(captions_per_image)), captions_per_image)
    pairs = np.stack([images, np.arange(len(images))], axis=1)
    pixels = ImageArray(np.zeros((len(captions_per_image), 2, 2, 3), np.uint8), "test")
    return RetrievalDataset("test", "train", pixels, [f"caption {i}" for i in range(len(images))], pairs)


def epoch_pairs(sampler, epoch=0, first_batch=0):
    return [list(zip(b.images.tolist(), b.captions.tolist())) for b in sampler.epoch(epoch, first_batch)]


def test_epoch_has_every_pair_once():
    data = dataset([5] * 20)
    seen = [pair for batch in epoch_pairs(BatchSampler(data, 10)) for pair in batch]
    assert sorted(seen) == [tuple(p) for p in data.pairs.tolist()]


@given(
    counts=st.lists(st.integers(0, 6), min_size=2, max_size=30).filter(lambda c: sum(c) >= 2),
    batch_size=st.integers(2, 12),
    seed=st.integers(0, 5),
)
@settings(max_examples=200, deadline=None)
def test_image_repeats_only_with_more_pairs_than_batches(counts, batch_size, seed):
    data = dataset(counts)
    batch_size = min(batch_size, sum(counts))
    sampler = BatchSampler(data, batch_size, seed=seed)
    batches = epoch_pairs(sampler)
    assert len(batches) == len(sampler) == sum(counts) // batch_size
    pairs = [pair for batch in batches for pair in batch]
    assert len(set(pairs)) == len(pairs) == len(batches) * batch_size
    used = np.bincount([i for i, _ in pairs], minlength=len(counts))
    for batch in batches:
        repeats = np.bincount([i for i, _ in batch], minlength=len(counts))
        for image in np.flatnonzero(repeats > 1):
            assert used[image] > len(batches)


def test_epoch_with_one_possible_assignment_has_no_repeats():
    # as many images as rows of a batch: each batch must have every image exactly once
    batches = epoch_pairs(BatchSampler(dataset([5] * 16), 16))
    assert all(sorted(i for i, _ in batch) == list(range(16)) for batch in batches)


def test_dropped_remainder_differs_by_epoch():
    data = dataset([3] * 11)
    sampler = BatchSampler(data, 8)
    dropped = []
    for epoch in range(2):
        batches = epoch_pairs(sampler, epoch)
        assert [len(b) for b in batches] == [8] * 4
        dropped.append(set(map(tuple, data.pairs.tolist())) - {p for b in batches for p in b})
    assert dropped[0] != dropped[1]


def test_sampling_one_draws_one_caption_of_each_image():
    data = dataset([0, *[4] * 12])
    sampler = BatchSampler(data, 6, "one")
    epochs = [[p for b in epoch_pairs(sampler, e) for p in b] for e in range(3)]
    for pairs in epochs:
        assert sorted(i for i, _ in pairs) == list(range(1, 13))
        assert set(pairs) <= set(map(tuple, data.pairs.tolist()))
    assert len({tuple(sorted(pairs)) for pairs in epochs}) == 3


@pytest.mark.parametrize("sampling", ["all", "one"])
def test_epoch_depends_on_seed_and_epoch_and_starts_at_any_batch(sampling):
    data = dataset([2, 3, 5, 1, 4, 5, 5, 2])
    sampler = BatchSampler(data, 3, sampling, seed=7)
    whole = epoch_pairs(sampler, 4)
    assert epoch_pairs(BatchSampler(data, 3, sampling, seed=7), 4) == whole
    assert epoch_pairs(sampler, 4, first_batch=1) == whole[1:]
    assert epoch_pairs(sampler, 5) != whole
    assert epoch_pairs(BatchSampler(data, 3, sampling, seed=8), 4) != whole


def test_process_slices_form_the_global_batch():
    batch = np.arange(24)
    for processes in (1, 2, 3, 8):
        parts = [batch[process_slice(24, rank, processes)] for rank in range(processes)]
        assert {len(p) for p in parts} == {24 // processes}
        assert (np.concatenate(parts) == batch).all()
    with pytest.raises(UserError, match="--batch_size 24 cannot be split over 5 processes"):
        process_slice(24, 0, 5)


def test_images_are_batched_with_many_other_images():
    # The pairs of an image must not be batched with the same other images all epoch.
    batches = epoch_pairs(BatchSampler(dataset([5] * 200), 20, seed=1))
    met = {i for batch in batches if any(j == 0 for j, _ in batch) for i, _ in batch}
    assert len(met) > 70


def test_caption_of_another_image_in_the_batch_is_no_negative_one():
    texts = ["a dog on a cat", "a cat on a dog", "a cup", "a bowl"]  # image 1 has two of them
    wrong = [["A cat on a dog."], ["a dog on a cat"], ["a pan"], ["A DOG ON A CAT!"]]
    data = replace(dataset([1, 2, 1]), captions=texts, negatives=Negatives.from_lists(wrong))
    kept = []
    for batch in (batch for epoch in range(9) for batch in BatchSampler(data, 2).epoch(epoch)):
        true = {texts[c] for image, c in data.pairs.tolist() if image in batch.images}
        for caption, found in zip(batch.captions.tolist(), batch.negatives.tolist(), strict=True):
            kept.append(wrong[caption][0].lower().strip(".!") not in true)
            assert found == (len(texts) + caption if kept[-1] else -1)
    assert {True, False} == set(kept)
