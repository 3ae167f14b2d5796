"""Text and JSON files: bounded, regular files only, and every error is one line that names the file."""

import gzip
import json
import os
import socket
import time

import numpy as np
import pytest

from clip_retrieval import files
from clip_retrieval.data.captions import clean_caption, mend_characters
from clip_retrieval.data.readers import annotations
from clip_retrieval.errors import UserError
from clip_retrieval.files import read_json, read_text

DIGITS = "1" * 5000


def fails(function, path, *words):
    with pytest.raises(UserError) as error:
        function(path)
    message = str(error.value)
    assert "\n" not in message and all(str(word) in message for word in (path, *words)), message


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_is_read_without_its_byte_order_mark(tmp_path, name):
    content = "\ufeffeine Straße\r\n狗 🐶\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_text(tmp_path / name) == "eine Straße\r\n狗 🐶\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"one\ntwo\xff", ["line 2", "0xff", "UTF-8"]),
        (b"\xef\xbb\xbfone\n\xc3", ["line 2", "0xc3", "UTF-8"]),
        ("one\ntwo".encode("utf-16"), ["line 1", "UTF-8"]),
        ("one\ntwo".encode("utf-16-le"), ["line 1", "NUL", "UTF-8"]),
        ("one\ntwo".encode("utf-32-be"), ["line 1", "NUL", "UTF-8"]),
        (b"one\ntwo\n\0three", ["line 3", "NUL"]),
        (b"\xed\xa0\x80", ["line 1", "UTF-8"]),
    ],
)
def test_other_encodings_name_the_line(tmp_path, content, words):
    (tmp_path / "a.csv").write_bytes(content)
    fails(read_text, tmp_path / "a.csv", *words)


@pytest.mark.parametrize("spoil", [lambda data: data[:-9], lambda data: data[:20] + b"oops" + data[24:], bytes.title])
def test_damaged_gzip(tmp_path, spoil):
    path = tmp_path / "a.json.gz"
    path.write_bytes(spoil(gzip.compress(os.urandom(500))))
    fails(read_text, path)
    path.write_bytes(b"{}")
    fails(read_text, path, "gzip")


def gzip_of_zeros(size):
    chunk, count = b"0" * 2**20, size // 2**20
    return gzip.compress(chunk) * count  # gzip files may be concatenated


@pytest.mark.parametrize("size", [2**29, 2**36])
def test_gzip_bomb_is_refused_quickly(tmp_path, size):
    path = tmp_path / "dataset_x.json.gz"
    path.write_bytes(gzip_of_zeros(size))
    began = time.process_time()
    fails(read_json, path, "unpack to")
    assert time.process_time() - began < 10


def test_gzip_of_captions_is_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BOMB_FROM", 0)
    path = tmp_path / "dataset_x.json.gz"
    text = json.dumps([f"a dog on lawn {n}" for n in range(20_000)])
    path.write_bytes(gzip.compress(text.encode()))
    assert len(read_json(path)) == 20_000


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_more_than_a_quarter_of_the_memory_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "memory_limit", lambda: 4 * 10**6)
    path = tmp_path / name
    for size, allowed in ((10**6, True), (10**6 + 1, False)):
        content = b" " * (size - 2) + b"[]"
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        if allowed:
            assert read_json(path) == []
        else:
            fails(read_json, path, "quarter of the memory")


def test_sparse_file_of_a_terabyte_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "memory_limit", lambda: 2**28)
    (tmp_path / "a.json").touch()
    os.truncate(tmp_path / "a.json", 2**40)
    fails(read_json, tmp_path / "a.json", "quarter of the memory")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (DIGITS, ["thousands of digits"]),
        (f"[-{DIGITS}]", ["thousands of digits"]),
        ('{"a": [1, ' + DIGITS + "]}", ["thousands of digits"]),
        ("[" * 100_000, ["nested too deeply"]),
        ('{"a":' * 100_000, ["nested too deeply"]),
        ('[1,\n2 "three"]', ["line 2", "column 3"]),
        ("", ["line 1"]),
        ('["\t"]', ["line 1"]),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else None,
)
def test_invalid_json(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    fails(read_json, tmp_path / "a.json", "broken JSON", *words)


def make_unreadable(kind, path):
    """Make `path` something other than a regular file; return the path to read."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        path.symlink_to("socket")
        socket.socket(socket.AF_UNIX).bind(str(path.parent / "socket"))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "below a file":
        path.write_text("{}")
        return path / path.name
    elif kind == "long name":
        return path.with_name(300 * "x" + path.name)
    elif kind == "NUL":
        return path.with_name("a\0" + path.name)
    elif kind == "half pair":
        return path.with_name("a\ud800" + path.name)
    return path


UNREADABLE = ["fifo", "socket", "device", "folder", "loop", "below a file", "long name", "NUL", "half pair", "missing"]


@pytest.mark.parametrize("kind", UNREADABLE)
def test_only_regular_files_are_read(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    for read, name in (
        (read_text, "a"),
        (read_json, "a.json.gz"),
        (annotations.read_ids, "a.npy"),
    ):
        fails(read, make_unreadable(kind, tmp_path / name))
        (tmp_path / "socket").unlink(missing_ok=True)


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i4", "u8"])
def test_ids_of_any_width(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.array([3, 1, 2], dtype))
    found = annotations.read_ids(tmp_path / "a.npy")
    assert found.dtype == np.int64 and found.tolist() == [3, 1, 2]


def test_ids_that_do_not_fit_are_not_wrapped(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1, 2**63], np.uint64))
    fails(annotations.read_ids, tmp_path / "a.npy", "whole numbers")


def test_half_surrogate_pairs_become_u_fffd():
    emoji = "🐶"
    high, low = (chr(int.from_bytes(emoji.encode("utf-16-be")[i : i + 2], "big")) for i in (0, 2))
    assert mend_characters(high + low) == emoji
    for text, mended in [
        (high, "\ufffd"),
        (f"a {high}", "a \ufffd"),
        (f"{low}b", "\ufffdb"),
        (f"{low}{high}", "\ufffd\ufffd"),
        (f"{high}{emoji}{low}狗", f"\ufffd{emoji}\ufffd狗"),
        ("\udcff\udcfe", "\ufffd\ufffd"),
        ("plain", "plain"),
        (f"Straße {emoji}", f"Straße {emoji}"),
    ]:
        assert mend_characters(text) == mended
        assert clean_caption(f" {text}\n{text} ") == f"{mended} {mended}"
