"""Several data sets as one: their order, the scored splits, and the weights."""

import itertools
import logging
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_retrieval.data.batches.sampler import BatchSampler, number_of_samples, proportional
from clip_retrieval.data.dataset import UNSPLIT, RetrievalDataset
from clip_retrieval.data.images.image_files import ImageArray
from clip_retrieval.data.mixture import MixedImages, mix, read_mixture
from clip_retrieval.data.pixels.pixels import MixedPixels, make_pixels
from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.options import DataOptions
from tests.data.batches.test_sampler import dataset as one_dataset
from tests.data.batches.test_sampler import epoch_pairs
from tests.models.small import small_preprocess


def make_dataset(sizes, name="drawn", side=8, split="train"):
    """A data set of images with so many captions each; image i has pixels i, its captions name it."""
    owners = np.repeat(np.arange(len(sizes)), sizes)
    pixels = np.arange(len(sizes), dtype=np.uint8)[:, None, None, None] + np.zeros((1, side, side, 3), np.uint8)
    captions = [f"{name} {image} {number}" for number, image in enumerate(owners)]
    pairs = np.stack([owners, np.arange(len(owners))], axis=1)
    return RetrievalDataset(name, split, ImageArray(pixels, name), captions, pairs)


def mixture(*captions_per_image):
    return mix([make_dataset(sizes, name) for name, sizes in zip("abc", captions_per_image)], "mixture")


# One data set of several


def test_images_captions_and_pairs_are_concatenated():
    parts = [make_dataset([2, 1], "a"), make_dataset([0, 3], "b", side=12), make_dataset([1], "c")]
    whole = mix(parts, "a+b+c")
    assert (whole.name, whole.split, len(whole.images)) == ("a+b+c", "train", 5)
    assert whole.captions == [caption for part in parts for caption in part.captions]
    assert [whole.images.name(i) for i in range(5)] == [f"{n} image {i}" for n, i in ("a0", "a1", "b0", "b1", "c0")]
    assert [whole.images[i].size for i in range(5)] == [(8, 8)] * 2 + [(12, 12)] * 2 + [(8, 8)]
    assert whole.first_image.tolist() == [0, 2, 4, 5]
    for image, caption in whole.pairs.tolist():
        name, index, _ = whole.captions[caption].split()
        assert whole.images.name(image) == f"{name} image {index}"
    assert len(whole.pairs) == 7


def test_an_image_outside_is_an_index_error():
    images = MixedImages([make_dataset([1, 1]).images, make_dataset([1]).images])
    with pytest.raises(IndexError):
        images[3]


def test_images_are_opened_on_access():
    class Closed(list):
        def __getitem__(self, index):
            raise AssertionError("opened")

    images = MixedImages([Closed([0, 0]), make_dataset([1]).images])
    assert len(images) == 3 and images[2].size == (8, 8)
    with pytest.raises(AssertionError):
        images[1]


def test_a_part_without_pairs_is_named():
    with pytest.raises(UserError, match="b, train split: no image has a caption"):
        mix([make_dataset([1], "a"), make_dataset([0, 0], "b")], "a+b")


def test_pixels_equal_those_of_the_parts_in_any_order():
    parts = [
        make_pixels(make_dataset([1] * n, side=side).images, small_preprocess())
        for n, side in ((3, 8), (2, 40), (4, 16))
    ]
    pixels = MixedPixels(parts)
    assert len(pixels) == 9 and pixels.in_memory
    alone = [part(i) for part in parts for i in range(len(part))]
    for order in ([8, 0, 4, 4, 3, 2], [1], np.array([5, 6])):
        assert torch.equal(pixels.batch(order, [0] * len(order)), torch.stack([alone[i] for i in order]))
    assert torch.equal(pixels(7), alone[7])
    assert torch.equal(pickle.loads(pickle.dumps(pixels))(7), alone[7])


def test_each_crop_has_its_own_seed():
    noise = np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)
    parts = [make_pixels(ImageArray(half, "x"), small_preprocess(), augment="crop") for half in (noise[:2], noise[2:])]
    indices, seeds = [3, 0, 2, 0], [5, 6, 7, 8]
    expected = [parts[i // 2](i % 2, seed) for i, seed in zip(indices, seeds)]
    assert torch.equal(MixedPixels(parts).batch(indices, seeds), torch.stack(expected))
    assert not torch.equal(expected[1], expected[3])


def test_a_mixture_with_files_needs_worker_processes():
    class Files(list):
        pass

    drawings = make_pixels(make_dataset([1]).images, small_preprocess())
    assert not MixedPixels([drawings, make_pixels(Files([1]), small_preprocess())]).in_memory


# Scored splits


@pytest.fixture
def read_some():
    """read_some(a={"train", "val"}, b=UNSPLIT) returns a reader of data sets with these splits."""

    def reader(**splits):
        def read(options, split):
            has = splits[options.name]
            if has == UNSPLIT:
                return None if split == "val" else make_dataset([1, 2], options.name, split=UNSPLIT)
            return make_dataset([1, 2], options.name, split=split) if split in has else None

        return lambda split: read_mixture("mix", [DataOptions(dataset=name) for name in splits], split, read)

    return reader


def test_val_and_test_come_from_the_first_data_set_with_them(read_some, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, "clip_retrieval")
    read = read_some(a={"train"}, b={"train", "test"}, c={"train", "val", "test"})
    assert (read("val").name, read("val").split) == ("c", "val")
    assert (read("test").name, read("test").split) == ("b", "test")
    assert "test split: from b, the first" in caplog.text
    assert (read("train").split, len(read("train").images)) == ("train", 6)


def test_a_data_set_without_splits_is_not_scored_as_held_out(read_some):
    assert read_some(a=UNSPLIT, b={"train", "test"})("test").name == "b"
    assert read_some(a=UNSPLIT, b={"train", "val"})("test") is None


def test_data_sets_without_splits_are_scored_on_the_first(read_some):
    read = read_some(a=UNSPLIT, b=UNSPLIT)
    assert read("train").split == UNSPLIT and read("val") is None
    assert (read("test").name, read("test").split) == ("a", UNSPLIT)


def test_a_data_set_without_a_train_split_is_named(read_some):
    with pytest.raises(UserError, match="b in datasets has no train split"):
        read_some(a={"train"}, b={"test"})("train")


# Weights


def test_without_weights_a_mixture_is_sampled_as_one_data_set():
    sizes = [2, 3, 5, 1, 4, 5, 5, 2]
    for sampling in ("all", "one"):
        whole = BatchSampler(mixture(sizes[:3], sizes[3:]), 3, sampling, seed=7)
        assert epoch_pairs(whole, 2) == epoch_pairs(BatchSampler(one_dataset(sizes), 3, sampling, seed=7), 2)


@given(
    total=st.integers(0, 1000),
    weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6),
)
def test_shares_are_rounded_and_sum_to_the_total(total, weights):
    shares = proportional(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights):
        assert abs(share - total * weight / sum(weights)) < 1 + 1e-6


def test_the_largest_remainders_are_rounded_up():
    assert proportional(10, [1, 1, 1]) == [4, 3, 3]
    assert proportional(10, [0.5, 3.5, 6]) == [1, 3, 6]
    assert proportional(7, [0.1, 0.2, 0.4]) == [1, 2, 4]


def count_pairs(sampler, epoch=0):
    """Count the occurrences of each pair in an epoch."""
    return np.bincount(
        [caption for batch in epoch_pairs(sampler, epoch) for _, caption in batch],
        minlength=len(sampler.dataset.captions),
    )


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 9), (0.25, 0.75)])
@pytest.mark.parametrize("sampling", ["all", "one"])
def test_an_epoch_has_each_part_in_proportion(weights, sampling):
    data = mixture([2] * 20, [1] * 40)  # 40 pairs each; 20 and 40 images
    samples = number_of_samples(data, sampling)
    sampler = BatchSampler(data, samples, sampling, weights=weights)  # a batch of all: no remainder
    count = count_pairs(sampler)
    of_parts = [int(count[:40].sum()), int(count[40:].sum())]
    assert sum(of_parts) == samples
    assert of_parts == sampler.shares == proportional(samples, weights)


def test_oversampling_is_even_and_undersampling_changes_each_epoch():
    sampler = BatchSampler(mixture([2] * 10, [5] * 20), 120, weights=(3, 1))
    counts = [count_pairs(sampler, epoch) for epoch in range(3)]
    for count in counts:
        assert sorted(count[:20]) == [4] * 10 + [5] * 10  # 90 of 20 pairs
        assert sorted(count[20:]) == [0] * 70 + [1] * 30
    for a, b in itertools.combinations(counts, 2):
        assert (a[:20] != b[:20]).any() and (a[20:] != b[20:]).any()


def test_one_caption_per_image_samples_the_images_evenly():
    data = mixture([3] * 10, [4] * 30)
    sampler = BatchSampler(data, 40, "one", weights=(3, 1))
    images = np.bincount([image for batch in epoch_pairs(sampler) for image, _ in batch], minlength=40)
    assert images[:10].tolist() == [3] * 10
    assert sorted(images[10:]) == [0] * 20 + [1] * 10
    assert {pair for batch in epoch_pairs(sampler) for pair in batch} <= {tuple(pair) for pair in data.pairs.tolist()}


@given(
    counts=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12).filter(any), min_size=2, max_size=3),
    batch_size=st.integers(2, 12),
    sampling=st.sampled_from(["all", "one"]),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_no_image_repeats_in_a_batch_unless_it_exceeds_the_batches(counts, batch_size, sampling, data):
    whole = mixture(*counts)
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(counts), max_size=len(counts)))
    batch_size = min(batch_size, number_of_samples(whole, sampling))
    sampler = BatchSampler(whole, batch_size, sampling, weights=weights)
    batches = epoch_pairs(sampler)
    assert [len(batch) for batch in batches] == [batch_size] * len(sampler)
    used = np.bincount([image for batch in batches for image, _ in batch], minlength=len(whole.images))
    for batch in batches:
        repeats = np.bincount([image for image, _ in batch], minlength=len(whole.images))
        assert (used[repeats > 1] > len(batches)).all()


@pytest.mark.parametrize("sampling", ["all", "one"])
def test_a_weighted_epoch_depends_on_seed_and_epoch_only(sampling):
    data = mixture([2, 3, 5], [1, 4, 5, 5, 2])
    sampler = BatchSampler(data, 3, sampling, seed=7, weights=(2, 1))
    whole = epoch_pairs(sampler, 4)
    assert epoch_pairs(BatchSampler(data, 3, sampling, seed=7, weights=(2, 1)), 4) == whole
    assert epoch_pairs(sampler, 4, first_batch=1) == whole[1:]
    assert epoch_pairs(sampler, 5) != whole
    assert epoch_pairs(BatchSampler(data, 3, sampling, seed=8, weights=(2, 1)), 4) != whole


def test_the_fingerprint_depends_on_the_order_of_data_sets():
    parts = make_dataset([2, 1], "a"), make_dataset([2, 1], "b"), make_dataset([2], "a"), make_dataset([1, 2, 1], "b")
    prints = {
        BatchSampler(data, 2).fingerprint
        for data in (parts[0], mix(parts[:2], "x"), mix(parts[1::-1], "x"), mix(parts[2:], "x"))
    }
    assert len(prints) == 4
    assert BatchSampler(mix(parts[:2], "x"), 2).fingerprint in prints
