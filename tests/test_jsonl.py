"""Files with one JSON record per line."""

import json
import time

import pytest

from clip_retrieval import jsonl
from clip_retrieval.errors import UserError
from clip_retrieval.files import parse_json, to_json
from clip_retrieval.jsonl import is_id, parse_record, read_records

DIGITS = "1" * 5000


def test_records_with_byte_order_mark_and_empty_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"a": "狗"}\r\n\r\n  \n{"a": 2}'.encode())
    assert list(read_records(tmp_path / "a.jsonl")) == [(1, {"a": "狗"}), (4, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": ' + DIGITS.encode() + b"}", "thousands of digits"),
        (b'{"a": [' * 50_000, "nested too deeply"),
        (b'{"a": 1}{"a": 2}', "glued"),
        (b'{"a": "\xff"}', "0xff"),
        (b"[]", "not a JSON object, but a list"),
        (b'{"a": 1,}', "column 9"),
        (b"\0", "broken JSON"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
    ],
    ids=lambda value: repr(value[:10]),
)
def test_bad_line_is_named(tmp_path, line, words):
    with pytest.raises(ValueError, match=words):
        parse_record(line)
    (tmp_path / "a.jsonl").write_bytes(b"{}\n\n" + line)
    with pytest.raises(UserError) as error:
        list(read_records(tmp_path / "a.jsonl"))
    assert words in str(error.value) and f"{tmp_path}/a.jsonl, line 3: " in str(error.value)
    assert str(error.value).count(";") == 1  # one remedy


def test_overlong_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 100)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": "' + "x" * 100 + '"}\n')
    with pytest.raises(UserError, match="line 2: longer than 100 bytes"):
        list(read_records(tmp_path / "a.jsonl"))


def test_empty_lines_and_a_long_line_take_linear_time(tmp_path):
    text = "x" * 10**8
    (tmp_path / "a.jsonl").write_text("\n" * 10**6 + json.dumps({"a": text}))
    began = time.process_time()
    assert list(read_records(tmp_path / "a.jsonl")) == [(10**6 + 1, {"a": text})]
    assert time.process_time() - began < 10


@pytest.mark.parametrize("text", ["狗 🐶", "\ud83d", "a\udcffb", '"\\u0041"', "\0\n", "\ud800\ud801x"])
def test_json_round_trip_in_utf_8(text):
    for content in (text, {text: [text]}):
        written = to_json(content)
        assert parse_json(written) == json.loads(written.decode("utf-8")) == content
    assert "狗".encode() in to_json({"a": "狗"}), "readable"


@pytest.mark.parametrize(
    ("value", "good"),
    [(7, True), (-7, True), (10**2000, True), (10**3000, False), ("", True), ("a", True), (True, False), (1.0, False)],
    ids=lambda value: None,
)
def test_ids_are_texts_and_printable_integers(value, good):
    assert is_id(value) == good
    if good:
        assert json.loads(to_json(value)) == value
