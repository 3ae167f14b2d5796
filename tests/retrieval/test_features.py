"""Features on disk are read back bit for bit."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_retrieval import jsonl
from clip_retrieval.errors import UserError
from clip_retrieval.retrieval import features as module
from clip_retrieval.retrieval.features import read_features, write_features
from tests.conftest import write_jsonl

IDS = [3, 9223372036854775807, -1, 2**70, "a[1].jpg", '女孩 "x"\t', "3", ""]


def bits(vectors):
    return np.ascontiguousarray(vectors, np.float32).view(np.uint32)


@pytest.mark.parametrize("name", ["x_imgs.img_feat.jsonl", "image_features.npy", "other.npy"])
def test_round_trip_is_exact(tmp_path, name):
    vectors = np.random.default_rng(0).normal(size=(len(IDS), 33)).astype(np.float32)
    write_features(tmp_path / name, "image", IDS, vectors)
    found = read_features(tmp_path / name, "image")
    assert list(found.ids) == IDS
    np.testing.assert_array_equal(bits(found.vectors), bits(vectors))
    assert not list(tmp_path.glob(".*"))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_nine_digits_restore_every_float32(numbers):
    """Includes the neighbours of powers of two, and subnormal numbers."""
    vector = np.array([numbers], np.float32)
    powers = np.exp2(np.round(np.log2(np.abs(vector) + 1)).clip(max=127))
    for moved in (vector, np.nextafter(vector, np.float32(-1)), np.nextafter(powers, np.float32(0)), powers):
        (line,) = module._format_lines("image_id", [1], moved.astype(np.float32))
        read = np.array([json.loads(line)["feature"]], np.float32)
        np.testing.assert_array_equal(bits(read), bits(moved))


def test_every_bit_pattern_of_a_range_is_restored():
    start = np.float32(0.0625).view(np.uint32)
    vector = np.arange(start - 40_000, start + 40_000, dtype=np.uint32).view(np.float32)[None]
    (line,) = module._format_lines("image_id", [1], vector)
    np.testing.assert_array_equal(bits([json.loads(line)["feature"]]), bits(vector))


def test_json_lines_of_other_systems(tmp_path):
    vectors = np.random.default_rng(1).normal(size=(5, 7)).astype(np.float32)
    records = [{"text_id": i, "feature": vector.tolist()} for i, vector in enumerate(vectors)]
    path = write_jsonl(tmp_path / "t.txt_feat.jsonl", records)
    np.testing.assert_array_equal(bits(read_features(path, "text").vectors), bits(vectors))
    path.write_text(path.read_text().replace("\n", "\r\n\n").replace(", ", ",").removesuffix("\r\n\n"))
    found = read_features(path, "text")
    np.testing.assert_array_equal(bits(found.vectors), bits(vectors))
    assert found.ids == [0, 1, 2, 3, 4]


def test_bad_line_is_named_after_empty_lines(tmp_path):
    vectors = np.random.default_rng(1).normal(size=(9, 30)).astype(np.float32)
    path = tmp_path / "x.img_feat.jsonl"
    write_features(path, "image", range(9), vectors)
    found = read_features(path, "image")
    assert found.ids == list(range(9))
    np.testing.assert_array_equal(bits(found.vectors), bits(vectors))
    lines = path.read_text().splitlines()
    lines[7] = lines[7].replace("image_id", "image")
    path.write_text("\n\n".join(lines))
    with pytest.raises(UserError, match=r'x.img_feat.jsonl, line 15: no "image_id"'):
        read_features(path, "image")


def test_npy_without_ids_uses_rows_as_ids(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((3, 2), np.float16))
    assert list(read_features(tmp_path / "a.npy", "image").ids) == [0, 1, 2]


GOOD = '{"image_id": 1, "feature": [0.5, 2]}\n'


@pytest.mark.parametrize(
    "content, words",
    [
        ("", ["holds no features"]),
        ("\n\n", ["holds no features"]),
        (GOOD + "{oops\n", ["line 2", "broken JSON"]),
        (GOOD + GOOD, ["image_id 1", "twice", "items 1 and 2"]),
        (GOOD + "[1]\n", ["line 2", "list"]),
        (GOOD + '{"image_id": 2.5, "feature": [1, 2]}', ["line 2", "2.5", '"image_id"']),
        (GOOD + '{"image_id": true, "feature": [1, 2]}', ["line 2", "True"]),
        (GOOD + '{"text_id": 2, "feature": [1, 2]}', ["line 2", 'no "image_id"']),
        (GOOD + '{"image_id": 2}', ["line 2", 'no "feature"']),
        (GOOD + '{"image_id": 2, "feature": []}', ["line 2", 'no "feature"']),
        (GOOD + '{"image_id": 2, "feature": [1]}', ["line 2", "1 numbers", "2"]),
        (GOOD + '{"image_id": 2, "feature": [1, "2"]}', ["line 2", "list of numbers"]),
        (GOOD + '{"image_id": 2, "feature": [1, null]}', ["line 2", "list of numbers"]),
        ("\ufeff" + GOOD + '{"image_id": "\udcff"', ["line 2", "UTF-8"]),
    ],
)
def test_bad_lines_are_named(tmp_path, content, words):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as error:
        read_features(path, "image")
    assert all(word in str(error.value) for word in [str(path), *words]) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "ids, words",
    [
        ("{}", ["list"]),
        ("[1, 2", ["broken JSON"]),
        ("[1, 2.5, 3]", ["numbers or texts"]),
        ("[1]", ["1 id,", "3 features"]),
    ],
)
def test_bad_ids_are_named(tmp_path, ids, words):
    np.save(tmp_path / "image_features.npy", np.ones((3, 2), np.float32))
    (tmp_path / "image_ids.json").write_text(ids)
    with pytest.raises(UserError) as error:
        read_features(tmp_path / "image_features.npy", "image")
    assert all(word in str(error.value) for word in ["image_ids.json", *words])


def test_unwritable_path_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "no" / "x.jsonl"):
        with pytest.raises(OSError, match=str(path)):  # run_with_exit_code makes it one line
            write_features(path, "image", [1], np.ones((1, 2), np.float32))


@pytest.mark.parametrize("name", ["x.jsonl", "x.npy"])
def test_non_finite_features_are_not_written(tmp_path, name):
    with pytest.raises(UserError, match="text_id b: feature is not finite"):
        write_features(tmp_path / name, "text", ["a", "b"], np.array([[1, 2], [3, np.inf]], np.float32))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("use_orjson", [True, False], ids=["orjson", "json"])
def test_records_are_equal_with_and_without_orjson(monkeypatch, use_orjson):
    if use_orjson:
        pytest.importorskip("orjson")
    else:
        monkeypatch.setattr(jsonl, "orjson", None)
    lines = ['{"image_id": 7, "feature": [1, -0.5, 1e-3, 16777217]}', '{"image_id": "七", "feature": []}']
    lines += ['{"image_id": 1180591620717411303424, "feature": [2.5]}', '{"image_id": 1, "feature": [Infinity]}']
    for line in lines:
        assert jsonl.parse_record_of_numbers(line.encode(), "image_id") == json.loads(line)
    for line in (b'{"image_id": 1}{"image_id": 2}', b"[1]", b'{"image_id": "\xff"}', b"{", b"[" * 100_000):
        with pytest.raises(ValueError) as error:
            jsonl.parse_record_of_numbers(line, "image_id")
        with pytest.raises(ValueError) as of_json:
            jsonl.parse_record(line)
        assert str(error.value) == str(of_json.value)
