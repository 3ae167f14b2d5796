"""Batches from shards: the files' pairs, the same for any number of processes and workers, from any batch on."""

import io
import json
from collections import Counter

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from clip_retrieval.data.captions import tokenize
from clip_retrieval.data.images.image_files import decode_rgb
from clip_retrieval.data.pixels import pixels as pixels_module
from clip_retrieval.data.pixels.pixels import ImageTransform
from clip_retrieval.data.shards import lanes
from clip_retrieval.data.shards.lanes import LaneReader
from clip_retrieval.data.shards.order import ShardOrder, Shards
from clip_retrieval.data.shards.samples import read_samples
from clip_retrieval.data.shards.stream import StreamLoader, find_positives, lanes_of_process
from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.errors import UserError
from tests.data.make_shards import jpeg, numbered, write_shard, write_shards
from tests.models.small import small_preprocess

COUNTS = (7, 12, 5, 21)


class Simulated(Processes):
    """One of several processes, without the others; their images differ from all images of this one."""

    def _reduce(self, tensor, operation):
        return tensor

    def all_gather(self, tensor):
        gathered = torch.arange(self.world_size * len(tensor))
        gathered[self.rank * len(tensor) :][: len(tensor)] = tensor
        return gathered

    def all_gather_rows(self, tensor):
        return tensor


@pytest.fixture(scope="module")
def tokenizer():
    return SimpleTokenizer(context_length=16)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), COUNTS)


@pytest.fixture
def stream(shards, tokenizer):
    """stream(...) makes a loader, by default of batches of 8 pairs of `shards`."""

    def make(
        paths=None, *, rank=0, processes=1, num_workers=0, augment="none", caption_key=None, trim=False, **options
    ):
        sizes, device = options.pop("sizes", None), options.pop("device", "cpu")
        bucket = options.pop("bucket", 1)
        options = {"batch_size": 8, "shuffle_buffer": 24, "seed": 3} | options
        one = ShardOrder(Shards(paths or shards, sizes), **options)
        transform = ImageTransform(small_preprocess(), augment=augment)
        return StreamLoader(
            LaneReader(one, transform, caption_key),
            tokenizer,
            trim=trim,
            bucket=bucket,
            num_workers=num_workers,
            device=torch.device(device),
            processes=Simulated(rank, processes) if processes > 1 else SINGLE_PROCESS,
        )

    return make


def pairs(batches):
    """(bytes of the pixels, ids) of each pair of the batches."""
    return [(i.numpy().tobytes(), tuple(t.tolist())) for batch in batches for i, t in zip(batch.images, batch.texts)]


def pairs_of_files(paths, tokenizer):
    """As `pairs`, for all samples of the shards, read without a loader."""
    transform, found = ImageTransform(small_preprocess()), []
    for path in paths:
        for sample in read_samples(path):
            image = transform(decode_rgb(io.BytesIO(sample["jpg"]), "a sample"))
            ids = tokenize([sample["txt"].decode()], tokenizer).ids[0].tolist()
            found.append((image.numpy().tobytes(), tuple(ids)))
    return found


def assert_same(batches, others):
    for a, b in zip(batches, others, strict=True):
        assert a.images.equal(b.images) and a.texts.equal(b.texts) and a.positives.equal(b.positives)
        assert a.lengths.equal(b.lengths)


def test_epoch_has_each_pair_of_the_files_once(stream, shards, tokenizer):
    everything = Counter(pairs_of_files(shards, tokenizer))
    assert len(everything) == sum(COUNTS)
    orders = []
    for epoch in range(2):
        seen = pairs(stream().epoch(epoch))
        assert len(set(seen)) == len(seen) == sum(COUNTS) - sum(COUNTS) % 8
        assert set(seen) <= set(everything)
        orders.append(seen)
    assert orders[0] != orders[1]


def test_shapes_and_dtypes_of_a_batch(stream):
    for batch in stream().epoch(0):
        assert batch.images.shape == (8, 3, 16, 16) and batch.images.dtype == torch.uint8
        assert batch.texts.shape == (8, 16) and batch.texts.dtype == torch.int64
        assert batch.positives.tolist() == [[i, i] for i in range(8)] and batch.positives.dtype == torch.int64


@pytest.mark.parametrize("augment", ["none", "crop"])
@pytest.mark.parametrize("processes, num_workers", [(1, 1), (1, 3), (2, 0), (2, 3), (4, 0)])
def test_global_batch_does_not_depend_on_processes_or_workers(stream, augment, processes, num_workers):
    whole = list(stream(augment=augment).epoch(1))
    ranks = [
        list(stream(rank=rank, processes=processes, num_workers=num_workers, augment=augment).epoch(1))
        for rank in range(processes)
    ]
    for batch, *shares in zip(whole, *ranks, strict=True):
        assert batch.images.equal(torch.cat([share.images for share in shares]))
        assert batch.texts.equal(torch.cat([share.texts for share in shares]))
        rows = len(batch.images) // processes
        found = [share.positives + torch.tensor([rank * rows, 0]) for rank, share in enumerate(shares)]
        assert batch.positives.equal(torch.cat(found))


@pytest.mark.parametrize("options", [{}, {"num_samples": 100}], ids=["counted", "given"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_epoch_resumes_at_any_batch(stream, options, num_workers):
    whole = list(stream(augment="crop", **options).epoch(1))
    for first in (1, len(whole) // 2, len(whole) - 1):
        assert_same(stream(augment="crop", num_workers=num_workers, **options).epoch(1, first), whole[first:])


def test_interrupted_epoch_continues_in_the_open_shards(stream, monkeypatch):
    opened = []
    normal = lanes.read_samples
    monkeypatch.setattr(lanes, "read_samples", lambda *args: opened.append(args) or normal(*args))
    list(stream().epoch(0))
    at_once = len(opened)
    opened.clear()
    loader, found = stream(), []
    for first in range(0, 5, 2):
        batches = loader.epoch(0, first)
        found += [next(batches) for _ in range(min(2, 5 - first))]
    assert len(opened) == at_once
    assert_same(found, stream().epoch(0))


def test_resume_reads_no_earlier_shard_and_decodes_nothing_twice(stream, monkeypatch):
    whole = stream()
    order, last = whole.order, len(whole.order) - 1
    opened, decoded = [], []
    normal, decode = lanes.read_samples, decode_rgb
    monkeypatch.setattr(lanes, "read_samples", lambda path, first: opened.append(path) or normal(path, first))
    monkeypatch.setattr(pixels_module, "decode_rgb", lambda *args: decoded.append(args) or decode(*args))
    assert len(list(whole.epoch(0, last))) == 1
    assert len(decoded) == 8
    current = {lane: next(order.lane(0, lane, last * order.lane_share))[0].shard for lane in range(order.lanes)}
    assert opened[: order.lanes] == [order.shards.paths[shard] for shard in current.values()]


def test_shuffle_buffer_changes_only_the_order(stream):
    plain, shuffled = pairs(stream(shuffle_buffer=0).epoch(0)), pairs(stream(shuffle_buffer=100).epoch(0))
    assert plain != shuffled and sorted(plain) == sorted(shuffled)


def test_texts_are_trimmed_to_the_longest_of_the_part(stream):
    whole, cut, few = (list(stream(**o).epoch(0)) for o in ({}, {"trim": True}, {"trim": True, "bucket": 6}))
    for batch, short, bucketed in zip(whole, cut, few, strict=True):
        longest = int(batch.lengths.max())
        assert longest in (4, 5) and short.texts.equal(batch.texts[:, :longest])
        assert bucketed.texts.equal(batch.texts[:, :6])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gets_the_same_batches(stream):
    found = stream(device="cuda", num_workers=2).epoch(0)
    for batch, expected in zip(found, stream().epoch(0), strict=True):
        assert batch.images.is_cuda and batch.images.cpu().equal(expected.images)
        assert batch.texts.cpu().equal(expected.texts) and batch.positives.cpu().equal(expected.positives)


def test_crops_differ_from_epoch_to_epoch_and_between_samples(stream, tmp_path):
    path = write_shard(tmp_path / "same.tar", [(str(i), {"jpg": jpeg(0, 40, 40), "txt": "same"}) for i in range(24)])
    loader = stream([path], augment="crop")
    epochs = [[image for image, _ in pairs(loader.epoch(epoch))] for epoch in range(2)]
    assert len(epochs[0]) == 24 and len(set(epochs[0])) > 12
    assert set(epochs[0]) != set(epochs[1])


def test_list_of_captions_gives_a_different_one_each_epoch(stream, tmp_path, tokenizer):
    record = json.dumps({"alt": ["first text", "second text"]})
    path = write_shard(tmp_path / "lists.tar", [(str(i), {"jpg": jpeg(i), "json": record}) for i in range(24)])
    loader = stream([path], caption_key="alt")
    epochs = [dict(pairs(loader.epoch(epoch))) for epoch in range(2)]
    assert len(set(epochs[0].values())) == 2 and epochs[0].keys() == epochs[1].keys()
    assert sum(epochs[0][image] != epochs[1][image] for image in epochs[0]) > 4


@pytest.fixture
def damaged(tmp_path):
    """Two shards of 40 samples, six of them unusable."""
    samples = numbered(0, 40)
    for number, parts in {
        3: {"jpg": b"no image", "txt": "x"},
        4: {"jpg": jpeg(4)[:300], "txt": "x"},
        11: {"txt": "no image"},
        17: {"jpg": jpeg(17)},
        18: {"jpg": jpeg(18), "txt": "  "},
        39: {"jpg": jpeg(39), "json": "{}"},
    }.items():
        samples[number] = (f"{number:05}", parts)
    return [write_shard(tmp_path / f"{i}.tar", samples[20 * i : 20 * i + 20]) for i in range(2)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unusable_samples_are_counted_and_replaced(stream, damaged, caplog, num_workers):
    with caplog.at_level("WARNING", "clip_retrieval"):
        batches = list(stream(damaged, num_workers=num_workers).epoch(0))
    seen = pairs(batches)
    assert len(seen) == 40 and len(set(seen)) == 34
    (message,) = caplog.messages
    assert "epoch 1, batches 1 to 5: 6 samples could not be used" in message and ".tar, sample 000" in message
    for batch in batches:
        of = pairs([batch])
        assert sorted(batch.positives.tolist()) == [[i, j] for i in range(8) for j in range(8) if of[i] == of[j]]


def test_resumed_epoch_skips_the_same_samples(stream, damaged):
    whole = list(stream(damaged).epoch(0))
    for first in range(len(whole)):
        assert_same(stream(damaged).epoch(0, first), whole[first:])
    for rank in range(2):
        rows = slice(4 * rank, 4 * rank + 4)
        for batch, part in zip(whole, stream(damaged, rank=rank, processes=2).epoch(0), strict=True):
            assert batch.images[rows].equal(part.images)


def without_image(samples):
    return [(key, parts | {"jpg": b"none"}) for key, parts in samples]


@pytest.fixture
def one_bad(tmp_path):
    """41 samples, one of them unusable: in batches of 32, a lane has one sample per epoch."""
    samples = numbered(0, 41)
    return [write_shard(tmp_path / "one.tar", [*samples[:20], *without_image(samples[20:21]), *samples[21:]])]


@pytest.fixture
def bad_shard(tmp_path):
    """Four shards of 10 samples; all samples of one are unusable."""
    samples = [numbered(10 * i, 10) for i in range(4)]
    return [write_shard(tmp_path / f"{i}.tar", without_image(s) if i == 1 else s) for i, s in enumerate(samples)]


@pytest.mark.parametrize(
    "which, options",
    [
        ("one_bad", {"batch_size": 32}),
        ("bad_shard", {"batch_size": 8}),
        ("bad_shard", {"batch_size": 4}),
        ("bad_shard", {"batch_size": 4, "num_samples": 120}),
    ],
    ids=["sample", "lane", "part of a lane", "given"],
)
def test_lane_without_usable_samples_resumes_identically(stream, request, caplog, which, options):
    paths = request.getfixturevalue(which)
    num_warnings = 0
    for epoch in range(3):
        whole = list(stream(paths, **options).epoch(epoch))
        num_warnings += len(caplog.messages)
        caplog.clear()
        for first in range(1, len(whole)):
            assert_same(stream(paths, **options).epoch(epoch, first), whole[first:])
        for rank in range(2):
            rows = options["batch_size"] // 2
            parts = stream(paths, rank=rank, processes=2, num_workers=rank, **options).epoch(epoch)
            for batch, part in zip(whole, parts, strict=True):
                own = batch.positives[(batch.positives // rows == rank).all(1)] - torch.tensor([rank * rows, 0])
                assert batch.images[rank * rows :][:rows].equal(part.images) and part.positives.equal(own)
    assert num_warnings


def test_lane_resumed_in_a_later_round_finds_its_usable_sample(stream, tmp_path):
    samples = numbered(0, 6)
    paths = [write_shard(tmp_path / f"{i}.tar", without_image([s]) if i < 5 else [s]) for i, s in enumerate(samples)]
    options = {"batch_size": 2, "num_samples": 40}  # two lanes of three shards with one sample each
    whole = list(stream(paths, **options).epoch(0))
    for first in range(len(whole)):
        assert_same(stream(paths, **options).epoch(0, first), whole[first:])


def test_interrupted_epoch_logs_skipped_samples_and_batches(stream, damaged, caplog):
    loader = stream(damaged)
    batches = loader.epoch(0)
    for _ in range(3):
        next(batches)
    assert not caplog.messages
    batches.close()
    assert len(list(loader.epoch(0, 3))) == 2
    first, last = caplog.messages
    assert first.startswith("epoch 1, batches 1 to 3: ") and ".tar, sample 000" in first
    assert last.startswith("epoch 1, batches 1 to 5: 6 samples could not be used")
    caplog.clear()
    list(stream(damaged).epoch(0, 2))
    assert [message.split(":")[0] for message in caplog.messages] == ["epoch 1, batches 3 to 5"]


def test_interrupted_process_logs_its_own_skips_without_others(stream, damaged, caplog, monkeypatch):
    monkeypatch.setattr(Simulated, "_reduce", lambda *_: pytest.fail("collective without the other processes"))
    found = []
    for rank in range(2):
        batches = stream(damaged, rank=rank, processes=2).epoch(0)
        for _ in range(4):
            next(batches)
        batches.close()
        found += caplog.messages
        caplog.clear()
    assert found and all("of this process's samples could not be used" in message for message in found)


def test_error_without_usable_samples_names_the_first(stream, tmp_path):
    path = write_shard(tmp_path / "bad.tar", [(f"{i:05}", {"jpg": b"none", "txt": "x"}) for i in range(16)])
    for num_workers in (0, 1):
        with pytest.raises(UserError, match=r"^[^\n]*bad\.tar, sample 000\d\d: not a readable image[^\n]*$"):
            list(stream([path], num_workers=num_workers).epoch(0))


@pytest.mark.parametrize("sizes, than", [((7, 14, 5, 21), "fewer"), ((7, 10, 5, 21), "more")])
def test_wrong_count_of_a_shard_is_named(stream, sizes, than):
    with pytest.raises(UserError, match=rf"train-001\.tar: holds {than} samples than the {sizes[1]}.*sizes\.json"):
        for epoch in range(3):  # the wrong sample may be among the dropped ones
            list(stream(sizes=sizes).epoch(epoch))


def test_deleted_shard_is_named(stream, tmp_path):
    paths = write_shards(tmp_path, [8, 8])
    loader = stream(paths, sizes=[8, 8])
    paths[1].unlink()
    with pytest.raises(UserError, match=r"train-001\.tar"):
        list(loader.epoch(0))


def test_number_of_processes_must_divide_the_lanes(shards):
    counted, given = (ShardOrder(Shards(shards), 8, num_samples=number) for number in (None, 40))
    assert [len(lanes_of_process(counted, Simulated(rank, 8))) for rank in range(8)] == [1] * 8
    with pytest.raises(UserError, match="--batch_size 8: 3 processes cannot share its 8 parallel parts"):
        lanes_of_process(counted, Simulated(0, 3))
    with pytest.raises(UserError, match=r"--batch_size 8 of 4 shards.*--train_num_samples"):
        lanes_of_process(given, Simulated(0, 8))


def test_captions_of_one_image_in_several_samples_are_positives(stream, tmp_path):
    samples = [(f"{i:05}", {"jpg": jpeg(i // 4), "txt": f"thing {i}"}) for i in range(16)]
    path = write_shard(tmp_path / "captions.tar", samples)
    for batch in stream([path]).epoch(0):
        of = [image.numpy().tobytes() for image in batch.images]
        assert len(set(of)) < 8
        assert sorted(batch.positives.tolist()) == [[i, j] for i in range(8) for j in range(8) if of[i] == of[j]]


@pytest.mark.parametrize("kinds", [1, 3, 20, 10**6])
def test_find_positives_equals_pairwise_comparison(kinds):
    keys = torch.randint(-kinds, kinds, (24,), generator=torch.Generator().manual_seed(kinds))
    for first, number in ((0, 24), (8, 8), (12, 12)):
        expected = (keys[first : first + number, None] == keys).nonzero()
        assert torch.equal(find_positives(keys, first, number), expected)


@pytest.mark.parametrize(
    "batches, long, message",
    [(2, 5, "epoch 1, batches 1 to 2: 5 captions cut"), (1, 1, "epoch 1, batch 1: 1 caption cut")],
)
def test_cut_captions_are_counted(stream, tmp_path, caplog, batches, long, message):
    number = 8 * batches
    samples = [(f"{i:05}", {"jpg": jpeg(i), "txt": "a thing " * (9 if i < long else 1)}) for i in range(number)]
    path = write_shard(tmp_path / "long.tar", samples)
    loader = stream([path])
    with caplog.at_level("INFO", "clip_retrieval"):
        for epoch in range(2):
            list(loader.epoch(epoch))
    assert caplog.messages == [f"{message} to 16 tokens"]


def test_loading_does_not_change_the_global_random_state(stream):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(stream(augment="auto").epoch(0))
    assert torch.get_rng_state().equal(before)


def test_autoaugment_changes_crops(stream):
    cropped, changed = (pairs(stream(augment=augment).epoch(0)) for augment in ("crop", "auto"))
    assert [text for _, text in cropped] == [text for _, text in changed]
    assert [image for image, _ in cropped] != [image for image, _ in changed]
