"""The order of samples in shards: every sample once, the same for any number of processes."""

from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_retrieval.data.shards.order import ShardOrder, Shards, number_of_lanes, shuffle_in_buffer
from clip_retrieval.errors import UserError

COUNTS = [7, 12, 5, 0, 11, 30]


def order(counts=COUNTS, batch_size=8, **options):
    return ShardOrder(Shards([Path(f"{i}.tar") for i in range(len(counts))], counts), batch_size, **options)


def lane_samples(one, epoch, lane, first=0, number=None):
    """(shard, number) of a lane's samples, by default to the end of the epoch."""
    number = len(one) * one.lane_share - first if number is None else number
    samples = ((s.shard, int(i)) for s, numbers in one.lane(epoch, lane, first) for i in numbers)
    return list(islice(samples, number))


def epoch_samples(one, epoch=0):
    return [lane_samples(one, epoch, lane) for lane in range(one.lanes)]


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(lambda c: sum(c) >= 12),
    batch_size=st.integers(2, 12),
    buffer=st.integers(0, 40),
    epoch=st.integers(0, 3),
)
@settings(max_examples=200, deadline=None)
def test_epoch_has_every_sample_once_except_the_remainder(counts, batch_size, buffer, epoch):
    one = order(counts, batch_size, shuffle_buffer=buffer)
    lanes = epoch_samples(one, epoch)
    seen = Counter(sample for lane in lanes for sample in lane)
    assert max(seen.values()) == 1
    assert set(seen) <= {(shard, i) for shard, count in enumerate(counts) for i in range(count)}
    assert sum(counts) - len(seen) == sum(counts) % batch_size
    assert {len(lane) for lane in lanes} == {len(one) * batch_size // one.lanes}


@pytest.mark.parametrize("counts", [COUNTS, [21]])
def test_remainder_differs_by_epoch_also_for_one_shard(counts):
    one = order(counts)
    everything = {(shard, i) for shard, count in enumerate(counts) for i in range(count)}
    dropped = [frozenset(everything - {s for lane in epoch_samples(one, epoch) for s in lane}) for epoch in range(4)]
    assert len(set(dropped)) > 1 and {len(d) for d in dropped} == {sum(counts) % 8}


@pytest.mark.parametrize("options", [{}, {"num_samples": 100}], ids=["counted", "given"])
def test_lane_can_start_at_any_sample(options):
    one = order([7, 12, 5, 1, 11, 30], shuffle_buffer=24, seed=5, **options)
    for lane in range(one.lanes):
        whole = lane_samples(one, 2, lane, number=60)
        for first in range(60):
            assert lane_samples(one, 2, lane, first, 60 - first) == whole[first:]


def test_order_is_a_function_of_seed_and_epoch():
    assert epoch_samples(order(seed=1), 3) == epoch_samples(order(seed=1), 3)
    assert epoch_samples(order(seed=1), 3) != epoch_samples(order(seed=2), 3)
    assert epoch_samples(order(seed=1), 3) != epoch_samples(order(seed=1), 4)


def test_shuffle_buffer_changes_only_the_order_within_shards():
    plain, shuffled = order(), order(shuffle_buffer=40)
    for lane, mixed in zip(epoch_samples(plain), epoch_samples(shuffled), strict=True):
        assert lane != mixed and sorted(lane) == sorted(mixed)
        shards = [shard for shard, _ in lane]
        assert shards == [shard for shard, _ in mixed]
        # without a buffer: in the order of the shard
        assert all(a[0] != b[0] or b[1] in (a[1] + 1, 0) for a, b in pairwise(lane))


@given(number=st.integers(0, 60), size=st.integers(1, 70), seed=st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_sample_leaves_the_buffer_after_it_entered(number, size, seed):
    left = shuffle_in_buffer(number, size, np.random.default_rng(seed))
    assert sorted(left.tolist()) == list(range(number))
    assert all(sample < place + size for place, sample in enumerate(left.tolist()))


def test_buffer_as_large_as_the_shard_shuffles_uniformly():
    rng = np.random.default_rng(0)
    orders = Counter(tuple(shuffle_in_buffer(3, 3, rng).tolist()) for _ in range(6000))
    assert len(orders) == 6 and all(abs(number - 1000) < 150 for number in orders.values())


def test_epoch_of_given_length_repeats_whole_shards():
    one = order([4, 4, 4, 4], 4, num_samples=40)
    assert one.lanes == 4 and len(one) == 10
    lanes = epoch_samples(one)
    assert sorted(sorted({shard for shard, _ in lane}) for lane in lanes) == [[0], [1], [2], [3]]
    for lane in lanes:
        assert Counter(lane) == {(lane[0][0], i): 3 - (i > 1) for i in range(4)}


def test_epoch_of_given_length_counts_shards_lazily(monkeypatch):
    counted = []
    monkeypatch.setattr("clip_retrieval.data.shards.order.count_samples", lambda path: counted.append(path.stem) or 10)
    one = order([None] * 6, 4, num_samples=40)
    assert len(one) == 10 and one.settings and counted == []
    lane_samples(one, 0, 1, number=15)
    assert len(counted) == 2


def test_lane_with_only_empty_shards_is_refused():
    one = order([0, 0], 2, num_samples=40)
    with pytest.raises(UserError, match=r"\.tar: holds no images with captions"):
        lane_samples(one, 0, 0)


@pytest.mark.parametrize(
    "batch_size, shards, lanes",
    [
        (256, None, 32),
        (1024, None, 32),
        (32768, None, 256),
        (10, None, 10),
        (35, None, 35),
        (100, None, 100),
        (1000, None, 40),
        (96, None, 96),
        (1536, None, 96),
        (160, None, 160),
        (6144, None, 96),
        (12288, None, 192),
        (256, 6, 4),
        (256, 1, 1),
        (7, 3, 1),
    ],
)
def test_usual_numbers_of_processes_can_share_the_lanes(batch_size, shards, lanes):
    assert number_of_lanes(batch_size, shards or batch_size) == lanes
    one = order([9] * (shards or 2), batch_size, num_samples=9 if shards else None)
    assert one.lanes == lanes and one.lanes * one.lane_share == batch_size


def test_fingerprint_distinguishes_data(tmp_path, monkeypatch):
    for number in range(len(COUNTS)):
        (tmp_path / f"{number}.tar").write_bytes(b"1234")
    monkeypatch.chdir(tmp_path)
    fingerprints = {order(counts).fingerprint for counts in (COUNTS, COUNTS[:-1], [8, 11, *COUNTS[2:]])}
    (tmp_path / "0.tar").write_bytes(b"12345")  # the same number of samples, but other bytes
    assert len(fingerprints | {order(COUNTS).fingerprint}) == 4
    paths = [tmp_path / "a.tar", tmp_path / "b.tar"]
    for path in paths:
        path.write_bytes(b"1234")
    before = ShardOrder(Shards(paths), 2, num_samples=10).fingerprint
    assert before == ShardOrder(Shards(paths), 2, num_samples=10).fingerprint
    paths[0].write_bytes(b"12345")
    assert before != ShardOrder(Shards(paths), 2, num_samples=10).fingerprint


def test_epoch_length_is_in_the_settings_not_the_fingerprint(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"1234")
    given = [ShardOrder(Shards([tmp_path / "a.tar"]), 2, num_samples=number) for number in (10, 12)]
    assert [one.settings["train_num_samples"] for one in (*given, order())] == [10, 12, None]
    assert given[0].fingerprint == given[1].fingerprint


@pytest.mark.parametrize("options", [{}, {"num_samples": 100}], ids=["counted", "given"])
def test_fallback_of_each_lane_has_all_samples_once(options):
    counts = [7, 12, 5, 0, 11, 30]
    one = order(counts, **options)
    everything = [(shard, i) for shard, count in enumerate(counts) for i in range(count)]
    found = [[(s.shard, int(i)) for s, numbers in one.fallback(1, lane) for i in numbers] for lane in range(one.lanes)]
    assert all(sorted(samples) == everything for samples in found)
    assert len({samples[0] for samples in found}) > 1
