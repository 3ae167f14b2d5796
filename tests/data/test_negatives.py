"""Negative captions: their readers, selections and mixtures."""

import json

import numpy as np
import pytest

from clip_retrieval.data.mixture import mix
from clip_retrieval.data.negatives import Negatives
from clip_retrieval.data.readers import csv_file
from clip_retrieval.errors import UserError

HEADER = "image,caption,split,wrong\n"


def by_caption(dataset):
    """The negative captions of each caption, by its text."""
    return dict(zip(dataset.captions, map(list, dataset.negatives.lists()), strict=True))


@pytest.fixture
def read_csv(read, photos, tmp_path):
    """read_csv(rows, split) reads a csv of two images."""

    def read_rows(rows, split="train", **options):
        photos(tmp_path, "a.jpg", "b.jpg")
        (tmp_path / "captions.csv").write_text(HEADER + rows)
        csv_file._read_rows.cache_clear()
        return read("csv", tmp_path, split, **{"negative_column": "wrong", **options})

    return read_rows


def test_csv_has_a_text_a_list_or_nothing_in_each_row(read_csv, caplog):
    rows = "a.jpg,one,train,two\na.jpg,three,train,\"['four', 'five']\"\nb.jpg,six,train,\na.jpg,one,train,seven\n"
    dataset = read_csv(rows)
    assert by_caption(dataset) == {"one": ["two", "seven"], "three": ["four", "five"], "six": []}
    assert list(dataset.texts) == ["one", "three", "six", "two", "seven", "four", "five"]
    assert "1 of 3 captions is without a negative caption" in caplog.text


def test_csv_cell_with_captions_has_a_negative_one_for_each(read_csv):
    rows = 'a.jpg,"[""one"", ""two""]",train,"[""three"", ""four""]"\n'
    assert by_caption(read_csv(rows)) == {"one": ["three"], "two": ["four"]}
    with pytest.raises(UserError, match="line 2: 2 captions and 1 negative ones; give one for each caption"):
        read_csv(rows.replace('"[""three"", ""four""]"', "three"))


def test_negative_that_is_a_caption_of_the_image_is_left_out(read_csv, caplog):
    dataset = read_csv("a.jpg,one dog,train,two dogs\na.jpg,two dogs,train,Two dogs.\nb.jpg,six,train,one dog\n")
    assert by_caption(dataset) == {"one dog": [], "two dogs": [], "six": ["one dog"]}
    assert "2 of 3 negative captions are left out: equal to a caption of the image" in caplog.text


def test_missing_or_empty_column_gives_none(read_csv, caplog):
    rows = "a.jpg,one,train,two\nb.jpg,six,test,\n"
    assert read_csv(rows, negative_column="other").negatives is None
    assert "captions.csv: no negative caption in other" in caplog.text
    assert read_csv("a.jpg,one,train,\n").negatives is None
    assert read_csv(rows, "test").negatives is None
    assert read_csv(rows, negative_column=None).negatives is None


@pytest.mark.parametrize("value, expected", [("two", ["two"]), (["two", "three"], ["two", "three"]), (None, [])])
def test_karpathy_json_has_them_in_its_sentences(read, photos, tmp_path, value, expected):
    photos(tmp_path / "images", "a.jpg", "b.jpg")
    images = [
        {"filename": "a.jpg", "split": "train", "sentences": [{"raw": "one", "wrong": value}]},
        {"filename": "b.jpg", "split": "train", "sentences": [{"raw": "six", "wrong": "seven"}]},
    ]
    (tmp_path / "dataset_x.json").write_text(json.dumps({"images": images}))
    dataset = read("karpathy", tmp_path, "train", negative_column="wrong")
    assert by_caption(dataset) == {"one": expected, "six": ["seven"]}


def test_karpathy_json_with_another_type_is_refused(read, photos, tmp_path):
    photos(tmp_path / "images", "a.jpg")
    images = [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "one", "wrong": [1]}]}]
    (tmp_path / "dataset_x.json").write_text(json.dumps({"images": images}))
    with pytest.raises(UserError, match=r"a\.jpg, has 'wrong' that is no text or list of texts"):
        read("karpathy", tmp_path, "train", negative_column="wrong")


def test_selections_and_mixtures_keep_them(read_csv, read):
    rows = "a.jpg,one,train,two\nb.jpg,,train,lost\nb.jpg,six,train,seven\n"
    chosen = read_csv(rows)  # without the empty caption
    assert by_caption(chosen) == {"one": ["two"], "six": ["seven"]}
    without = read_csv(rows, negative_column=None)
    mixed = mix([without, chosen], "mixed")
    assert [list(texts) for texts in mixed.negatives.lists()] == [[], [], ["two"], ["seven"]]
    assert mix([without, without], "mixed").negatives is None


def test_draws_are_uniform_and_none_for_captions_without():
    negatives = Negatives.from_lists([["a", "b"], [], ["c"]])
    drawn = negatives.draw(np.array([0, 1, 2] * 1000), np.random.default_rng(0)).reshape(-1, 3)
    assert np.bincount(drawn[:, 0]).tolist() == pytest.approx([500, 500], abs=60)
    assert set(drawn[:, 1]) == {-1} and set(drawn[:, 2]) == {2}
