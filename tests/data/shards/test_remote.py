"""Remote shards: the bytes of the files through any fault of a server, or one clear line within bounded time."""

import gzip
import importlib.util
import itertools
import json
import tarfile
import tracemalloc

import fsspec
import pytest

from clip_retrieval.data.pixels.pixels import ImageTransform
from clip_retrieval.data.readers import webdataset
from clip_retrieval.data.shards import remote, sizes, sources
from clip_retrieval.data.shards.find import absolute_patterns, expand_patterns
from clip_retrieval.data.shards.lanes import LaneReader
from clip_retrieval.data.shards.order import ShardOrder, Shards
from clip_retrieval.data.shards.remote import RemoteFile, Url
from clip_retrieval.data.shards.samples import check_layout, count_samples, read_samples
from clip_retrieval.data.shards.sizes import known_sizes
from clip_retrieval.errors import RunError, UserError
from clip_retrieval.options import DataOptions
from tests.data.make_shards import jpeg, numbered, write_shard, write_shards
from tests.data.shard_server import ShardServer
from tests.models.small import small_preprocess

CONTENT = bytes(range(256)) * 2000
HEADER = tarfile.TarInfo("x.bin")


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited for a server."""
    waits = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    return waits


@pytest.fixture
def server(tmp_path, waits):
    server = ShardServer(tmp_path)
    yield server
    server.close()


@pytest.fixture
def store(tmp_path, monkeypatch):
    """fsspec's store in memory, as an allowed one."""
    monkeypatch.setitem(remote.STORES, "memory", "fsspec")
    remote.list_store.cache_clear()
    store = fsspec.filesystem("memory")
    yield store
    store.store.clear()


def read_all(url):
    file, parts = RemoteFile(Url(url)), []
    while part := file.read():
        parts.append(part)
    file.close()
    return b"".join(parts)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("faults", [[], ["500", "reset"], ["drop", "500", "drop"], ["drop", "reset"] * 4], ids=len)
def test_bytes_equal_the_file_through_faults(server, tmp_path, ranges, faults):
    (tmp_path / "0.tar").write_bytes(CONTENT)
    server.ranges, server.faults = ranges, [*faults]
    if not ranges:
        server.faults = [fault for fault in faults if fault != "drop"] + ["drop"] * ("drop" in faults)
    assert read_all(f"{server.url}/0.tar") == CONTENT and not server.faults
    assert any(begin for _, begin in server.requests) == ("drop" in faults)


def test_part_of_an_unknown_place_is_never_used(server, tmp_path):
    (tmp_path / "0.tar").write_bytes(CONTENT)
    server.faults, server.silent = ["drop"], True
    with pytest.raises(RunError, match="an unknown part instead of byte 256,000"):
        read_all(f"{server.url}/0.tar")


def test_body_without_an_announced_length_is_read(server, tmp_path):
    (tmp_path / "0.tar").write_bytes(CONTENT)
    server.length = False
    assert read_all(f"{server.url}/0.tar?token=secret") == CONTENT


def test_dead_server_ends_after_bounded_tries_without_the_query(server, waits):
    server.down = True
    words = r"0\.tar: the server failed 6 times in a row at byte 0 \(HTTP 503\).*--resume auto"
    with pytest.raises(RunError, match=words) as error:
        read_all(f"{server.url}/0.tar?token=secret")
    assert len(server.requests) == remote.TRIES and sum(waits) == 31 and "secret" not in str(error.value)
    server.close()
    with pytest.raises(RunError, match=r"Connection refused"):
        read_all(f"{server.url}/0.tar")


def test_server_that_never_gets_further_ends_after_bounded_tries(server, tmp_path):
    (tmp_path / "0.tar").write_bytes(CONTENT)
    server.ranges, server.faults = False, ["drop"] * 100
    with pytest.raises(RunError, match=r"failed 6 times in a row at byte 256,000"):
        read_all(f"{server.url}/0.tar")
    assert len(server.requests) == 1 + remote.TRIES - 1


@pytest.mark.parametrize(
    "fault, words", [("404", "HTTP 404"), ("redirect", "redirected without end"), ("file", "to no web address")]
)
def test_final_refusals_are_not_retried(server, tmp_path, waits, fault, words):
    (tmp_path / "0.tar").write_bytes(CONTENT)
    server.faults = [fault] * 30
    with pytest.raises(UserError, match=rf"0\.tar: .*{words}"):
        read_all(f"{server.url}/0.tar")
    assert not waits and len(server.requests) < 12


@pytest.mark.parametrize("address", ["http://[broken/0.tar", "http://host:port/0.tar", "http:///0.tar"])
def test_invalid_address_is_one_line(waits, address):
    with pytest.raises(UserError, match="not a valid address"):
        read_all(address)
    assert not waits


def test_file_that_changes_while_it_is_read_is_refused(server, tmp_path):
    (tmp_path / "0.tar").write_bytes(CONTENT)
    server.faults = ["drop"]
    file = RemoteFile(Url(f"{server.url}/0.tar"))
    file.read(100)
    (tmp_path / "0.tar").write_bytes(CONTENT * 2)
    with pytest.raises(UserError, match=r"changed from 512,000 to 1,024,000 bytes"):
        while file.read():
            pass


def header(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf()


@pytest.mark.parametrize(
    "endless, words",
    [
        (b"\0" * 2**16, "data after its end"),
        (b"x" * 2**16, "a damaged header"),
        (header("x.bin", 2**40) + b"\0" * 2**16, "too large for a shard"),
        (header("x.jpg", 2**30) + b"\0" * 2**16, "more than the 268,435,456 allowed"),
        (header("x.bin", 0) * 100, "too large for a shard"),
    ],
    ids=["zeros", "text", "endless member", "image", "headers"],
)
def test_endless_body_ends_within_little_memory(server, monkeypatch, endless, words):
    monkeypatch.setattr(remote, "MAX_SHARD_BYTES", 2**25 if len(endless) > 60_000 else 2**22)
    server.endless = endless
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"0\.tar.*{words}"):
        count_samples(Url(f"{server.url}/0.tar"))
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_endless_sizes_json_is_refused(server, monkeypatch):
    monkeypatch.setattr(sizes, "MAX_SIZES_BYTES", 2**20)
    server.endless = b"[" * 2**16
    with pytest.raises(UserError, match=r"sizes\.json: larger than 1,048,576 bytes"):
        known_sizes([Url(f"{server.url}/0.tar")])


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz", "0.tar"])
def test_compressed_shards_equal_the_tar(server, tmp_path, name):
    tar = write_shard(tmp_path / "plain.tar", numbered(0, 7))
    (tmp_path / name).write_bytes(gzip.compress(tar.read_bytes()))
    for place in (tmp_path / name, Url(f"{server.url}/{name}"), Url(f"{server.url}/plain.tar")):
        assert count_samples(place) == 7
        assert [*read_samples(place, 2)] == [*read_samples(tar, 2)]
        check_layout(place, None)
    assert expand_patterns(f"{tmp_path}", "--train_data") == [tmp_path / name, tar]


@pytest.mark.parametrize("member", ["x.bin", "x.jpg"])
def test_gzip_bomb_is_refused_within_little_memory(tmp_path, monkeypatch, member):
    monkeypatch.setattr(sources, "BOMB_FROM", 2**22)
    bomb = header(member, 2**25) + bytes(2**25) + bytes(1024)
    (tmp_path / "bomb.tar.gz").write_bytes(gzip.compress(bomb))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"bomb\.tar\.gz: .* bytes unpack to .*, too many"):
        [*read_samples(tmp_path / "bomb.tar.gz")]
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


def test_truncated_shards_are_named(server, tmp_path):
    content = write_shard(tmp_path / "0.tar", numbered(0, 5)).read_bytes()
    (tmp_path / "0.tar").write_bytes(content[:3000])
    (tmp_path / "1.tar").write_bytes(gzip.compress(content)[:2000])
    for place in (Url(f"{server.url}/0.tar"), Url(f"{server.url}/1.tar"), tmp_path / "1.tar"):
        with pytest.raises(UserError, match=r"\d\.tar: cannot be read as a tar"):
            [*read_samples(place)]


def test_address_patterns_expand_without_a_request():
    braces = "https://host/a/{00..02}.tar"
    found = expand_patterns(f"{braces} https://other/0.tar", "--train_data")
    assert [str(url) for url in found] == [f"https://host/a/0{i}.tar" for i in range(3)] + ["https://other/0.tar"]
    assert [url.name for url in expand_patterns(f"{braces}?token=a", "--train_data")] == ["00.tar", "01.tar", "02.tar"]
    assert absolute_patterns(f"{braces} hf://datasets/x/y.tar") == f"{braces}::hf://datasets/x/y.tar"


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("https://host/*.tar", "web servers do not list files"),
        ("file:///tmp/0.tar", "file: is not supported"),
        ("memory://0.tar", "memory: is not supported"),
        ("zip://0.tar", "zip: is not supported"),
        ("filecache::https://host/0.tar", "shard filecache is missing"),
        ("pipe:cat x.tar", "pipe: runs a program, which is not allowed"),
        ("s3://bucket/0.tar", r"s3:// needs s3fs \(pip install s3fs\)"),
    ],
)
def test_other_addresses_are_refused_with_a_remedy(monkeypatch, pattern, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"^--train_data .*{words}"):
        expand_patterns(pattern, "--train_data")


def test_store_of_fsspec_is_listed_and_read(store, tmp_path):
    tar = write_shard(tmp_path / "0.tar", numbered(0, 5))
    for number in range(3):
        store.pipe(f"/data/{number}.tar", tar.read_bytes())
    store.pipe("/data/sizes.json", json.dumps({"0.tar": 5, "2.tar": 4}).encode())
    found = expand_patterns("memory://data/*.tar", "--train_data")
    assert [str(url) for url in found] == [f"memory:///data/{i}.tar" for i in range(3)]
    assert known_sizes(found) == [5, None, 4]
    assert [*read_samples(found[1])] == [*read_samples(tar)]
    with pytest.raises(UserError, match=r"9\.tar: refused by the store"):
        count_samples(Url("memory://data/9.tar"))


@pytest.mark.parametrize(
    "table, expected", [(None, [None]), ('{"0.tar": 7}', [7]), ('{"1.tar": 7}', [None]), (b"\xff", "broken JSON")]
)
def test_remote_sizes_json(server, tmp_path, table, expected):
    if table is not None:
        (tmp_path / "sizes.json").write_bytes(table.encode() if isinstance(table, str) else table)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=rf"sizes\.json: {expected}"):
            known_sizes([Url(f"{server.url}/0.tar")])
    else:
        assert known_sizes([Url(f"{server.url}/0.tar")]) == expected


@pytest.mark.parametrize("number", [-1, 10**9, "9" * 30, 1.5])
def test_impossible_number_in_a_remote_sizes_json_is_refused(server, tmp_path, number):
    (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": number}))
    with pytest.raises(UserError, match=r"sizes\.json: 0\.tar has .* samples"):
        known_sizes([Url(f"{server.url}/0.tar")])


@pytest.mark.parametrize("buffer", [0, 6, 100])
@pytest.mark.parametrize("kind", ["remote", "gzip"])
def test_unknown_counts_give_the_local_order_from_any_sample_on(server, tmp_path, kind, buffer):
    paths = write_shards(tmp_path, (7, 0, 5, 12, 4, 3))
    places = [Url(f"{server.url}/{path.name}") for path in paths]
    if kind == "gzip":
        places = [path.with_suffix(".tgz") for path in paths]
        for path, place in zip(paths, places):
            place.write_bytes(gzip.compress(path.read_bytes()))

    def read(places, lane, first):
        order = ShardOrder(Shards(places), 2, num_samples=40, shuffle_buffer=buffer, seed=1)
        pairs = LaneReader(order, ImageTransform(small_preprocess(), augment="crop"))(0, lane, first)
        return [(pair.caption, pair.key, pair.pixels.numpy().tobytes()) for pair, _ in itertools.islice(pairs, 30)]

    for lane in range(2):
        for first in range(0, 30, 1 if buffer == 6 else 7):
            assert read(places, lane, first) == read(paths, lane, first)


def test_remote_val_shards_equal_local_ones(server, tmp_path):
    first = write_shard(tmp_path / "val-0.tar", [*numbered(0, 5), ("bad", {"jpg": jpeg(9)})])
    second = write_shard(tmp_path / "val-1.tar", numbered(3, 5))
    (tmp_path / "val-1.tgz").write_bytes(gzip.compress(second.read_bytes()))
    server.faults = ["drop", "500"]
    local, copied = (
        webdataset.read(DataOptions(dataset=("webdataset",), val_data=data).parts()[0], "val")
        for data in (f"{first} {second}", f"{server.url}/val-0.tar {tmp_path}/val-1.tgz")
    )
    assert copied.captions == local.captions and copied.pairs.tolist() == local.pairs.tolist()
    assert copied.image_ids == local.image_ids and len(local.images) == 8
    assert [copied.images.encoded(i) for i in range(8)] == [local.images.encoded(i) for i in range(8)]
    assert copied.images.name(0) == f"{server.url}/val-0.tar, 00000.jpg"
    assert copied.images.stamp(0) == (len(jpeg(0)), copied.images.stamp(7)[1])


def test_remote_train_shards_are_refused_in_a_mixture(server):
    options = DataOptions(dataset=("webdataset",), train_data=f"{server.url}/0.tar").parts()[0]
    with pytest.raises(UserError, match=r"remote train shards are only for the training of a single data set"):
        webdataset.read(options, "train")
