"""LMDB files: the keys and values of liblmdb, and an error instead of a crash for any damage."""

import os
import pickle
import random
import struct

import lmdb
import pytest

from clip_retrieval.data.images.lmdb_reader import LmdbReader
from clip_retrieval.data.images.pair_pickle import read_pair
from clip_retrieval.data.workers import map_in_workers
from clip_retrieval.errors import UserError


def write(folder, transactions, **options):
    """Write an LMDB; each transaction is {key: value, or None to delete it}."""
    with lmdb.open(str(folder), map_size=2**28, **options) as env:
        for content in transactions:
            with env.begin(write=True) as transaction:
                for key, value in content.items():
                    transaction.put(key, value) if value is not None else transaction.delete(key)
    return folder


def content_of(folder):
    with lmdb.open(str(folder), readonly=True, lock=False) as env, env.begin() as transaction:
        return dict(transaction.cursor()), env.stat()


def random_content(seed, number, longest_key, longest_value):
    draw = random.Random(seed)
    sizes = [draw.randint(0, longest_value) if draw.random() < 0.5 else draw.randint(0, 60) for _ in range(number)]
    return {draw.randbytes(draw.randint(1, longest_key)): draw.randbytes(size) for size in sizes}


SHAPES = {
    "empty": [{}],
    "one": [{b"a": b""}],
    "few": [{b"a": b"1", b"ab": b"x" * 2000, b"b": b"y" * 4080, b"c": b"z" * 100_000}],
    "many": [{str(i).encode(): b"value %d" % i for i in range(20_000)}],
    "deep": [random_content(1, 4000, 500, 300)],
    "large values": [random_content(2, 300, 30, 20_000)],
    "changed": [
        random_content(3, 2000, 100, 3000),
        dict.fromkeys(list(random_content(3, 2000, 100, 3000))[::3]),
        random_content(4, 1000, 300, 5000),
    ],
    "emptied": [{b"a": b"1", b"b": b"2"}, {b"a": None, b"b": None}],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_keys_and_values_are_those_of_liblmdb(tmp_path, shape):
    expected, stat = content_of(write(tmp_path, SHAPES[shape]))
    assert (shape != "deep" or stat["depth"] >= 4) and (shape != "large values" or stat["overflow_pages"] > 100)
    reader = LmdbReader(tmp_path, 2**20)
    assert list(reader.iter_keys()) == list(expected) and dict(reader.items()) == expected
    keys = random.Random(0).sample(list(expected), min(500, len(expected)))
    assert all(reader.get(key) == expected[key] and reader.size(key) == len(expected[key]) for key in keys)
    for key in (b"", b"\xff" * 500, *(key + b"\0" for key in keys[:50]), *(key[:-1] for key in keys[:50])):
        assert reader.get(key) == expected.get(key) and (reader.size(key) is None) == (key not in expected)
        after = [(k, v) for k, v in expected.items() if k >= key]
        assert list(reader.items(key)) == after


def test_a_forked_process_can_read(tmp_path):
    write(tmp_path, [{b"a": b"1"}])
    reader = LmdbReader(tmp_path, 100)
    assert list(map_in_workers(reader.get, [b"a", b"b"] * 20, num_workers=2)) == [b"1", None] * 20
    assert reader.get(b"a") == b"1"


def test_a_value_that_is_too_large_is_refused(tmp_path):
    reader = LmdbReader(write(tmp_path, [{b"a": b"1" * 10_000, b"b": b"1" * 10_001}]), 10_000)
    assert len(reader.get(b"a")) == 10_000
    with pytest.raises(UserError, match="a value of 10,001 bytes, too large"):
        reader.get(b"b")


def meta_of(content):
    """Return the begin of the newer one of the first two pages."""
    first, second = (struct.unpack_from("<Q", content, begin + 144)[0] for begin in (0, 4096))
    return 0 if first > second else 4096


def test_named_databases_are_one_line(tmp_path):
    with lmdb.open(str(tmp_path), map_size=2**24, max_dbs=1) as env:
        env.open_db(b"pairs")
    with pytest.raises(UserError, match=r"data.mdb: damaged .a value is another database"):
        list(LmdbReader(tmp_path, 100).items())


@pytest.mark.parametrize("flag", [2, 4, 8])  # reversed keys, duplicates, integer keys
def test_other_kinds_of_keys_are_one_line(tmp_path, flag):
    path = write(tmp_path, [{b"a": b"1"}]) / "data.mdb"
    content = bytearray(path.read_bytes())
    struct.pack_into("<H", content, meta_of(content) + 92, flag)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"data.mdb: an LMDB with duplicate or special keys"):
        LmdbReader(tmp_path, 100)


def read_all(folder):
    """Read everything and return its size, or None after a UserError that names the file."""
    read = 0
    try:
        reader = LmdbReader(folder, 2**22)
        for key in list(reader.iter_keys()):
            read += len(reader.get(key) or b"") + (reader.size(key) or 0)
        read += sum(len(value) for _, value in reader.items(b"\x50"))
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
        return None
    return read


@pytest.mark.parametrize("shape", ["few", "deep", "large values", "changed"])
def test_damaged_pages_end_in_a_message(tmp_path, shape):
    content = SHAPES[shape] if shape != "deep" else [random_content(1, 300, 500, 300)]
    path = write(tmp_path, content) / "data.mdb"
    whole, draw, refused = path.read_bytes(), random.Random(shape), 0
    pages = len(whole) // 4096
    for _ in range(60 if len(whole) > 2**22 else 150):
        damaged = bytearray(whole)
        kind = draw.randrange(4)
        if kind == 0:  # some bits, most of them in the structure
            for _ in range(draw.randint(1, 20)):
                damaged[draw.randrange(pages) * 4096 + draw.randrange(100)] ^= 1 << draw.randrange(8)
        elif kind == 1:  # a page in the place of another
            source, target = draw.randrange(pages) * 4096, draw.randrange(pages) * 4096
            damaged[target : target + 4096] = whole[source : source + 4096]
        elif kind == 2:  # numbers of any size
            at = draw.randrange(pages) * 4096 + draw.randrange(0, 200, 2)
            damaged[at : at + 8] = struct.pack("<Q", draw.choice([0, 1, 2, pages - 1, pages, 2**32, 2**48, 2**64 - 1]))
        else:
            del damaged[draw.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        refused += read_all(tmp_path) is None
    assert refused > 15


def branch(number, children):
    """A branch page with a first key that is empty, and these (key, page) children."""
    nodes, offsets, at = {}, [], 4096
    for key, child in children:
        node = struct.pack("<HHHH", child & 0xFFFF, child >> 16, 0, len(key)) + key + b"\0" * (len(key) % 2)
        at -= len(node)
        nodes[at] = node
        offsets.append(at)
    page = bytearray(4096)
    struct.pack_into(f"<QHHHH{len(offsets)}H", page, 0, number, 0, 1, 16 + 2 * len(offsets), at, *offsets)
    for place, node in nodes.items():
        page[place : place + len(node)] = node
    return bytes(page)


@pytest.mark.parametrize("depth", [2, 5, 30, 33, 60000])
@pytest.mark.parametrize("to_itself", [False, True])
def test_a_tree_with_repeated_pages_ends(tmp_path, depth, to_itself):
    path = write(tmp_path, [{b"a": b"1"}]) / "data.mdb"
    whole = bytearray(path.read_bytes())
    begin = meta_of(whole)
    leaf = struct.unpack_from("<Q", whole, begin + 128)[0]
    # Each level has a hundred children, all of them the next page: 100 ** (depth - 1) visits of one leaf.
    first = len(whole) // 4096
    levels = min(depth, 40)
    for level in range(levels - 1):
        child = first if to_itself else leaf if level == levels - 2 else first + level + 1
        whole += branch(first + level, [(b"", child), *((b"k%02d" % i, child) for i in range(99))])
    struct.pack_into("<H", whole, begin + 94, depth)
    struct.pack_into("<QQ", whole, begin + 128, first, len(whole) // 4096 - 1)
    path.write_bytes(whole)
    assert read_all(tmp_path) is None


def test_keys_that_share_a_large_value_are_refused(tmp_path):
    """A file of a megabyte would unpack to fifty."""
    content = {b"big": b"x" * 10**6} | {b"k%02d" % i: b"12345678" for i in range(50)}
    path = write(tmp_path, [content]) / "data.mdb"
    page = LmdbReader(tmp_path, 2**20)._find(b"big")
    number = page[0][page[1] + 11 : page[1] + 19]  # of the first page of the large value
    small = struct.pack("<HHHH", 8, 0, 0, 3)
    large = struct.pack("<HHHH", 10**6 & 0xFFFF, 10**6 >> 16, 1, 3)
    whole = path.read_bytes()
    for i in range(50):
        whole = whole.replace(small + b"k%02d12345678" % i, large + b"k%02d" % i + number)
    path.write_bytes(whole)
    reader = LmdbReader(tmp_path, 2**20)
    assert len(reader.get(b"k07")) == 10**6
    with pytest.raises(UserError, match="several keys share a value"):
        list(reader.items())


@pytest.mark.parametrize("kind", ["fifo", "folder", "gone", "empty", "device"])
def test_a_path_that_is_not_an_lmdb_is_named(tmp_path, kind):
    path = tmp_path / "data.mdb"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "empty":
        path.touch()
    with pytest.raises(UserError, match=f"{tmp_path}.*not an LMDB"):
        LmdbReader(tmp_path, 100)


# Pickled pairs


PAIRS = [
    (1000002, 8428, "a dog"),
    ("1000002", -1, ""),
    (2**62, 2**31, "文本" * 200),
    (-(2**31) - 1, "x" * 300, "line\nbreak \\ 'quotes' \ud800 \x00"),
    (10**598, -(10**598), "x"),
    (10**2400, 2**8000, "x"),
    ("same", "same", "same"),
    (255, 256, "a" * 70_000),
    (65535, 65536, "é"),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("pair", PAIRS, ids=range(len(PAIRS)))
def test_pairs_of_every_protocol_are_read(protocol, pair):
    same = pair[0]
    pair = (same, same, same) if pair == ("same",) * 3 else pair
    assert read_pair(pickle.dumps(pair, protocol)) == pair
    assert read_pair(pickle._dumps(pair, protocol)) == pair  # the Python version, which writes some of them differently


def nested_lists():
    lists = ["x" * 10]
    for _ in range(12):
        lists = [lists] * 10
    return lists


def nested(depth):
    value = "x"
    for _ in range(depth):
        value = (value,)
    return value


HOSTILE = {
    "list of lists": pickle.dumps(nested_lists()),
    "bytes of 8 EB": b"\x80\x05\x96" + struct.pack("<Q", 2**63) + b".",
    "text of 8 EB": b"\x80\x04K\x01K\x02\x8d" + struct.pack("<Q", 2**63) + b"x\x87.",
    "number of 5,000 digits": pickle.dumps((10**5000, 2, "x")),
    "number of 5,000 digits in text": b"(L" + b"1" * 5000 + b"L\nI2\nVx\nt.",
    "nested tuples": b"\x80\x02" + b"(" * 10_000 + b"K\x01" + b"t" * 10_000 + b".",
    "tuple in a tuple": pickle.dumps(((1, 2, "x"), 2, "x")),
    "many tuples": b"(K\x01K\x01K\x01t" * 100_000 + b".",
    "operations of no use": b"\x80\x02" * 100_000 + b".",
    "global": b"cos\nsystem\n(S'true'\ntR.",
    "persistent id": b"Pid\n.",
    "extension": b"\x80\x02\x82\x01.",
    "dict": pickle.dumps({1: 2}),
    "no stop": pickle.dumps((1, 2, "x"))[:-1],
    "no text": pickle.dumps((1, 2, 3)),
    "boolean": pickle.dumps((True, 2, "x"), 0),
    "float": pickle.dumps((1.0, 2, "x")),
    "two": pickle.dumps((1, "x")),
    "empty": b"",
    "stop": b".",
    "mark": b"(.",
    "marks": b"(((\x87.",
    "get of nothing": b"h\x05.",
    "not UTF-8": b"\x80\x02K\x01K\x01X\x01\0\0\0\xff\x87.",
    "no end of a line": b"I5",
    "negative number of digits": b"I--5\n.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_any_other_pickle_is_refused(name):
    with pytest.raises(ValueError, match=r"^it .{4,80}$"):
        read_pair(HOSTILE[name])


def test_number_of_a_memo_entry_needs_no_memory():
    assert read_pair(b"\x80\x02K\x01r" + struct.pack("<I", 2**31) + b"K\x02X\x01\0\0\0x\x87.") == (1, 2, "x")


def test_mutated_pickles_are_pairs_or_refused():
    draw = random.Random(0)
    for _ in range(5000):
        content = bytearray(pickle.dumps(draw.choice(PAIRS[:4]), draw.randrange(6)))
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        try:
            pair = read_pair(bytes(content))
        except ValueError:
            continue
        assert tuple(map(type, pair)) in {(a, b, str) for a in (int, str) for b in (int, str)}
