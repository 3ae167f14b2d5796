"""The loader's batches: the reference's pixels, trimmed tokens, and positives."""

import numpy as np
import pytest
import torch
from PIL import Image

from clip_retrieval.data.batches.loader import TrainLoader, image_batches
from clip_retrieval.data.batches.sampler import BatchSampler, process_slice
from clip_retrieval.data.captions import Tokens
from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.image_files import ImageArray, ImageFiles
from clip_retrieval.data.pixels.pixels import choose_num_workers, make_pixels
from clip_retrieval.data.pixels.transforms import evaluation_transform
from clip_retrieval.errors import UserError
from tests.models.small import small_preprocess

IMAGES, CAPTIONS_EACH = 12, 2


@pytest.fixture(scope="module")
def dataset():
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 20, 26, 3), dtype=np.uint8)
    captions = [f"caption {i}" for i in range(IMAGES * CAPTIONS_EACH)]
    pairs = [(i // CAPTIONS_EACH, i) for i in range(len(captions))]
    return RetrievalDataset("test", "train", ImageArray(pixels, "test"), captions, np.array(pairs))


@pytest.fixture(scope="module")
def tokens(dataset):
    number = len(dataset.captions)
    lengths = torch.arange(number) % 5 + 3
    ids = torch.arange(number)[:, None].repeat(1, 9).int() * (torch.arange(9) < lengths[:, None])
    return Tokens(ids.int(), lengths, 0)


def loader(dataset, tokens, batch_size=6, rank=0, processes=1, num_workers=0, trim=True, augment="none", **options):
    return TrainLoader(
        BatchSampler(dataset, batch_size, seed=3),
        make_pixels(dataset.images, small_preprocess(), augment=augment),
        tokens,
        trim=trim,
        share=process_slice(batch_size, rank, processes),
        num_workers=num_workers,
        device=torch.device("cpu"),
        **options,
    )


def test_batch_has_the_sampled_pairs(dataset, tokens):
    transform = evaluation_transform(small_preprocess())
    sampler = BatchSampler(dataset, 6, seed=3)
    batches = list(loader(dataset, tokens).epoch(1))
    assert len(batches) == 4
    for batch, pairs in zip(batches, sampler.epoch(1), strict=True):
        assert batch.images.dtype == torch.uint8 and batch.images.shape == (6, 3, 16, 16)
        assert torch.equal(batch.images, torch.stack([transform(dataset.images[i]) for i in pairs.images]))
        longest = int(tokens.lengths[pairs.captions].max())
        assert torch.equal(batch.texts, tokens.ids[pairs.captions, :longest].long())
        expected = pairs.images[:, None] == pairs.captions[None] // CAPTIONS_EACH
        assert sorted(batch.positives.tolist()) == np.argwhere(expected).tolist()


def test_tokens_keep_their_padding_without_trim(dataset, tokens):
    assert {batch.texts.shape[1] for batch in loader(dataset, tokens, trim=False).epoch(0)} == {9}


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_global_batch_does_not_depend_on_processes_or_workers(dataset, tokens, augment):
    whole = list(loader(dataset, tokens, augment=augment).epoch(2))
    for processes, num_workers in ((2, 0), (3, 0), (1, 2)):
        parts = [
            list(loader(dataset, tokens, 6, rank, processes, num_workers, augment=augment).epoch(2))
            for rank in range(processes)
        ]
        for batch, *shares in zip(whole, *parts, strict=True):
            assert torch.equal(batch.images, torch.cat([share.images for share in shares]))
            assert torch.equal(batch.texts, torch.cat([share.texts for share in shares]))


def test_epoch_can_start_at_any_batch(dataset, tokens):
    one = loader(dataset, tokens, augment="crop", num_workers=1)
    whole = list(one.epoch(0))
    rest = list(one.epoch(0, first_batch=2))
    assert len(rest) == 2
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[2:], rest, strict=True))


def test_crops_differ_from_epoch_to_epoch_and_between_samples(dataset, tokens):
    same = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    pixels = np.repeat(same[None], IMAGES, axis=0)
    data = RetrievalDataset("test", "train", ImageArray(pixels, "test"), dataset.captions, dataset.pairs)
    one = loader(data, tokens, augment="crop")
    epochs = [[image.numpy().tobytes() for batch in one.epoch(epoch) for image in batch.images] for epoch in range(2)]
    assert len(epochs[0]) == 24 and len(set(epochs[0])) > 12
    assert set(epochs[0]) != set(epochs[1])


def test_loading_does_not_change_the_global_random_state(dataset, tokens):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader(dataset, tokens, augment="crop").epoch(0))
    pixels = make_pixels(dataset.images, small_preprocess())
    list(image_batches(pixels, [range(12)], num_workers=0, pin_memory=False))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_come_in_order_for_any_batch_size(dataset):
    def whole(batch_size, num_workers):
        ranges = [range(start, min(start + batch_size, IMAGES)) for start in range(0, IMAGES, batch_size)]
        pixels = make_pixels(dataset.images, small_preprocess())
        return torch.cat(list(image_batches(pixels, ranges, num_workers=num_workers, pin_memory=False)))

    reference = whole(1, 0)
    assert len(reference) == IMAGES
    assert torch.equal(whole(5, 0), reference) and torch.equal(whole(5, 2), reference)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_is_a_one_line_error_also_in_workers(tmp_path, num_workers):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "fine.jpg")
    images = ImageFiles([str(tmp_path / "fine.jpg"), str(tmp_path / "broken.jpg")])
    with pytest.raises(UserError) as error:
        pixels = make_pixels(images, small_preprocess())
        list(image_batches(pixels, [range(2)], num_workers=num_workers, pin_memory=False))
    assert str(error.value).startswith(str(tmp_path / "broken.jpg")) and "\n" not in str(error.value)


def test_images_in_memory_need_no_workers(dataset):
    files = make_pixels(ImageFiles(["a.jpg"]), small_preprocess())
    memory = make_pixels(dataset.images, small_preprocess())
    assert choose_num_workers(None, memory, torch.device("cuda")) == 0
    assert choose_num_workers(None, files, torch.device("cuda")) >= 1
    assert choose_num_workers(5, memory, torch.device("cpu")) == 5


@pytest.fixture
def broken(dataset, tmp_path):
    """The data set in files; files 3 and 7 are not images."""
    for i in range(IMAGES):
        dataset.images[i].save(tmp_path / f"{i}.png")
    for i in (3, 7):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    images = ImageFiles([str(tmp_path / f"{i}.png") for i in range(IMAGES)])
    return RetrievalDataset("broken", "train", images, dataset.captions, dataset.pairs)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_image_is_replaced_by_the_next_pair(broken, tokens, caplog, num_workers):
    transform = evaluation_transform(small_preprocess())
    with caplog.at_level("WARNING", "clip_retrieval"):
        batches = list(loader(broken, tokens, num_workers=num_workers, skip_unreadable=True, trim=False).epoch(0))
    for batch, pairs in zip(batches, BatchSampler(broken, 6, seed=3).epoch(0), strict=True):
        rows = list(range(6))
        for row in reversed(range(2 * 6)):
            if pairs.images[row % 6] in (3, 7):
                rows[row % 6] = rows[(row + 1) % 6]
        images, captions = pairs.images[rows], pairs.captions[rows]
        assert torch.equal(batch.images, torch.stack([transform(broken.images[i]) for i in images]))
        assert torch.equal(batch.texts, tokens.ids[captions].long())
        expected = images[:, None] == captions[None] // CAPTIONS_EACH
        assert sorted(batch.positives.tolist()) == np.argwhere(expected).tolist()
    (message,) = caplog.messages
    assert message.startswith("epoch 1, batches 1 to 4: 4 images could not be used")
    assert ".png: not a readable" in message


def test_interrupted_epoch_logs_skipped_images(broken, tokens, caplog):
    batches = loader(broken, tokens, skip_unreadable=True).epoch(0)
    for _ in range(3):
        next(batches)
    assert not caplog.messages
    batches.close()
    assert caplog.messages[0].startswith("epoch 1, batches 1 to 3: ")


def test_batch_without_readable_images_is_an_error(broken, tokens):
    images = ImageFiles([f"{path}.gone" for path in broken.images.paths])
    gone = RetrievalDataset("gone", "train", images, broken.captions, broken.pairs)
    with pytest.raises(
        UserError, match=r"\.png\.gone: no such image.*; no other image of its batch can be read either"
    ):
        list(loader(gone, tokens, skip_unreadable=True).epoch(0))
