"""Finding the shards of a split, and checking that they are complete."""

import gzip
import json
import os
import time

import pytest
from braceexpand import braceexpand

from clip_retrieval.data.shards.braces import count_expansions
from clip_retrieval.data.shards.find import (
    absolute_patterns,
    check_whole,
    expand_patterns,
    find_shards,
)
from clip_retrieval.data.shards.sizes import known_sizes
from clip_retrieval.errors import UserError
from clip_retrieval.options import DataOptions
from tests.data.make_shards import numbered, write_shard


@pytest.fixture
def tars(tmp_path):
    """tars("a.tar", ...) writes complete shards into the test's folder."""

    def write(*names):
        return [write_shard(tmp_path / name, numbered(0, 2)) for name in names]

    return write


def names(found):
    return None if found is None else (found.split, [path.name for path in found.paths])


def find(root, split, dataset="webdataset", **options):
    return names(find_shards(DataOptions(dataset=(dataset,), dataset_root=str(root), **options), split))


def test_braces_wildcards_folders_and_several_patterns(tmp_path, tars):
    a, b, c, d = tars("s/00000.tar", "s/00001.tar", "other/x.tar", "with blank/y.tar")
    assert expand_patterns(f"{tmp_path}/s/{{00000..00001}}.tar", "--train_data") == [a, b]
    assert expand_patterns(f"{tmp_path}/s/*.tar", "--train_data") == [a, b]
    assert expand_patterns(f"{tmp_path}/s", "--train_data") == [a, b]
    assert expand_patterns(f"{c} {tmp_path}/s/0000[01].tar", "--train_data") == [c, a, b]
    assert expand_patterns(f"{tmp_path}/with blank/*.tar", "--train_data") == [d]
    assert expand_patterns(f"{b} {tmp_path}/s/*.tar", "--train_data") == [b, a]  # each once


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("{00000..00002}.tar", ["00001.tar", "is missing"]),
        ("empty/*.tar", ["empty/*.tar", "no shards in"]),
        ("folder", ["folder", "no shards in"]),
        ("{00000..", ["00000..", "braces do not match"]),
        ("a b.tar", ["shard a ", "is missing"]),
        (" ", ["names no shards"]),
    ],
)
def test_missing_shards_are_refused(tmp_path, monkeypatch, tars, pattern, words):
    tars("00000.tar", "00002.tar")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        expand_patterns(pattern, "--val_data")
    assert all(word in str(error.value) for word in ["--val_data", *words]) and "\n" not in str(error.value)


def test_splits_are_found_by_names_of_files_or_folders(tmp_path, tars):
    tars("train-000.tar", "train1.tar", "trainable.tar", "valid_00.tar", "test/x.tar", "._train-000.tar")
    assert find(tmp_path, "train") == ("train", ["train-000.tar", "train1.tar"])
    assert find(tmp_path, "val") == ("val", ["valid_00.tar"])
    assert find(tmp_path, "test") == ("test", ["x.tar"])


def test_split_word_may_follow_the_data_set_name(tmp_path, tars):
    tars("cc3m-train-0000.tar", "cc3m-train-0001.tar", "cc3m-validation-0000.tar", "contest-0.tar")
    assert find(tmp_path, "train") == ("train", ["cc3m-train-0000.tar", "cc3m-train-0001.tar"])
    assert find(tmp_path, "val") == ("val", ["cc3m-validation-0000.tar"])
    assert find(tmp_path, "test") is None
    tars("train_val2014-000.tar", "train_dev-0.tar")
    assert find(tmp_path, "train")[1][2:] == ["train_dev-0.tar", "train_val2014-000.tar"]
    tars("coco-train-test-0.tar")
    with pytest.raises(
        UserError, match=r"coco-train-test-0.tar: its name has the words of several splits \(test and train\)"
    ):
        find(tmp_path, "train")
    named = {name: str(tmp_path / "coco-train-test-0.tar") for name in ("train_data", "val_data")}
    assert find(tmp_path, "train", **named) == ("train", ["coco-train-test-0.tar"])
    assert find(tmp_path, "test", **named) is None


def test_folder_without_splits_is_both_train_and_test_data(tmp_path, tars):
    tars("00000.tar", "00001.tar")
    assert find(tmp_path, "train") == find(tmp_path, "test") == ("all", ["00000.tar", "00001.tar"])
    assert find(tmp_path, "val") is None


def test_patterns_take_precedence_over_the_folder(tmp_path, tars):
    (held,) = tars("elsewhere/v.tar")
    tars("00000.tar", "00001.tar")
    assert find(tmp_path, "val", val_data=str(held)) == ("val", ["v.tar"])
    assert find(tmp_path, "train", val_data=str(held)) == ("train", ["00000.tar", "00001.tar"])  # no longer "all"
    assert find(tmp_path, "test", val_data=str(held)) is None
    assert find("/nowhere", "train", val_data=str(held)) is None
    assert find("/nowhere", "val", train_data=str(held)) is None


def test_shards_given_to_one_split_are_excluded_from_others(tmp_path, tars):
    a, b = tars("leak/00000.tar", "leak/00001.tar")
    root = tmp_path / "leak"
    (tmp_path / "link").symlink_to(root)
    for named in (str(b), f"{tmp_path}/link/00001.tar", f"{root}/0000[1-9].tar"):
        assert find(root, "train", val_data=named) == ("train", ["00000.tar"])
    assert find(root, "train", val_data=f"{a} {b}") is None
    assert find(root, "train", val_data=str(root)) is None


def test_option_overrides_the_split_word_in_a_name(tmp_path, tars):
    tars("train-0.tar", "train-1.tar", "val-0.tar", "test-0.tar")
    assert find(tmp_path, "train", val_data=f"{tmp_path}/train-1.tar") == ("train", ["train-0.tar"])
    assert find(tmp_path, "val", train_data=f"{tmp_path}/*.tar") is None
    assert find(tmp_path, "test", train_data=f"{tmp_path}/*.tar") is None
    assert find(tmp_path, "test", val_data=f"{tmp_path}/test-0.tar") == ("test", ["test-0.tar"])
    gone = f"{tmp_path}/val-0.tar {tmp_path}/gone.tar"
    assert find(tmp_path, "test", train_data=gone) == ("test", ["test-0.tar"])
    assert find(tmp_path, "val", train_data=gone) is None


def test_yfcc7m_is_found_in_simple_clips_folder(tmp_path, tars):
    tars("yfcc7m/00000.tar", "yfcc7m/00001.tar")
    assert find(tmp_path, "train", "yfcc7m") == ("all", ["00000.tar", "00001.tar"])
    assert find(tmp_path / "yfcc7m", "train", "yfcc7m") == ("all", ["00000.tar", "00001.tar"])


def test_error_for_a_folder_without_shards_names_the_option(tmp_path):
    with pytest.raises(UserError, match="--train_data"):
        find(tmp_path, "train")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda content: content[: len(content) // 2], "its end is missing"),
        (lambda content: content[:-1024], "its end is missing"),
        (lambda content: b"no tar at all" * 1000, "not a tar"),
        (lambda content: gzip.compress(b"no tar at all" * 1000), "not a tar"),
        (lambda content: gzip.compress(content)[:30], "end-of-stream"),
        (lambda content: b"", "not a tar"),
        (lambda content: bytes(10240), "contains no samples"),
    ],
)
def test_incomplete_tar_is_refused(tars, spoil, words):
    (path,) = tars("a.tar")
    check_whole(path)
    content = path.read_bytes().rstrip(b"\0") + bytes(1024)
    content += bytes(-len(content) % 512)
    path.write_bytes(content)
    check_whole(path)
    path.write_bytes(spoil(content))
    with pytest.raises(UserError, match=words) as error:
        check_whole(path)
    assert str(path) in str(error.value)


def test_sizes_json_gives_the_numbers_of_samples(tmp_path, tars):
    paths = tars("a/0.tar", "a/1.tar", "b/0.tar")
    (tmp_path / "a/sizes.json").write_text(json.dumps({"0.tar": 7, "2.tar": 9}))
    (tmp_path / "b/sizes.json").write_text(json.dumps({"0.tar": "12"}))
    os.truncate(paths[2], 12 * 1024)
    assert known_sizes(paths) == [7, None, 12]


def test_impossible_number_of_samples_is_refused(tmp_path, tars):
    (path,) = tars("0.tar")
    for number, size in ((100, 100 * 1024), (100, 100 * 1024 - 1), (2**39, 10240), ("9" * 30, 10240)):
        os.truncate(path, size)
        (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": number}))
        if size == 100 * 1024:
            assert known_sizes([path]) == [100]
        else:
            with pytest.raises(UserError, match=r"sizes\.json: 0\.tar has .* samples"):
                known_sizes([path])


@pytest.mark.parametrize("content", ["[]", '{"0.tar": -1}', '{"0.tar": 1.5}', '{"0.tar": null, "0.tar": "x"}', "{"])
def test_invalid_sizes_json_is_named(tmp_path, tars, content):
    paths = tars("0.tar")
    (tmp_path / "sizes.json").write_text(content)
    with pytest.raises(UserError, match=r"sizes\.json"):
        known_sizes(paths)


def test_each_pattern_is_made_absolute(tmp_path, monkeypatch, tars):
    monkeypatch.chdir(tmp_path)
    tars("my data/x.tar")
    assert absolute_patterns("a/{0..1}.tar b/*.tar") == f"{tmp_path}/a/{{0..1}}.tar::{tmp_path}/b/*.tar"
    assert absolute_patterns("my data/*.tar") == f"{tmp_path}/my data/*.tar"
    assert absolute_patterns("my data/train") == f"{tmp_path}/my data/train"  # Chinese-CLIP's
    assert absolute_patterns("a{ b/train") == f"{tmp_path}/a{{ b/train"


@pytest.mark.parametrize(
    "pattern",
    ["s/00000.tar s/00001.tar", "s/0000{0..1}.tar", "s/*0.tar s/*1.tar", "d0 d1", "s/00000.tar::d1"],
)
def test_absolute_patterns_match_the_same_files_despite_blanks(tmp_path, monkeypatch, tars, pattern):
    tars("a b/s/00000.tar", "a b/s/00001.tar", "a b/d0/00000.tar", "a b/d1/00001.tar")
    monkeypatch.chdir(tmp_path / "a b")
    found = [path.resolve() for path in expand_patterns(pattern, "--train_data")]
    absolute = absolute_patterns(pattern)
    monkeypatch.chdir(tmp_path)
    assert [path.resolve() for path in expand_patterns(absolute, "--train_data")] == found
    assert absolute_patterns(absolute) == absolute


@pytest.mark.parametrize(
    "pattern",
    [
        "a.tar",
        "{0..3}",
        "{00..12..5}x{3..1}",
        "{-2..2}{9..-9..-4}",
        "{a,b}{c,d,}{e}",
        "{x{0..3},y{4..5}{6,7}}z",
        "{{a,b},{c,{d,e{1..3}}}}",
        "a{}b{,}c",
        r"\{0..9\}{1,2\,3}",
        "{1..2..0}",
        "{0..3,x}",
        "{a}{{0..3}}",
        "a,b",
    ],
)
def test_count_of_braces_equals_their_expansion(pattern):
    assert count_expansions(pattern) == len(list(braceexpand(pattern)))


def test_count_of_letter_ranges_is_an_upper_bound():
    for pattern in ("{a..e}", "{Z..a..3}", "{a..B}"):
        assert len(list(braceexpand(pattern))) <= count_expansions(pattern) <= 52


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..999999999999}.tar",
        "{0..99999999999999999999999999}.tar",
        "{-999999999..999999999}",
        "{a,b}" * 40,
        "{0..99}" * 6,
        "{{0..99999},{0..99999}}" * 3,
        "{" * 3000 + "a,b" + "}" * 3000,
        "{a," * 300 + "b" + "}" * 300,
        "{0.." + "9" * 5000 + "}",
        "{" * 100_000,
        "{0..9999}" + "x" * 200_000,
    ],
    ids=lambda pattern: pattern[:20],
)
def test_braces_with_too_many_expansions_are_refused_quickly(pattern):
    start = time.process_time()
    for function in (lambda: expand_patterns(pattern, "--train_data"), lambda: absolute_patterns(f"{pattern} x.tar")):
        with pytest.raises(UserError, match="the braces"):
            function()
    assert time.process_time() - start < 2


def test_long_range_of_shards_is_expanded(tmp_path, tars):
    tars(*(f"s/{number:06}.tar" for number in range(3)))
    with pytest.raises(UserError, match=r"shard .*/s/000003\.tar is missing"):
        expand_patterns(f"{tmp_path}/s/{{000000..231349}}.tar", "--train_data")


@pytest.mark.parametrize("folder", ["shards [1]", "a*b", "what?"])
def test_folders_with_characters_of_patterns(tmp_path, tars, monkeypatch, folder):
    tars(f"{folder}/0.tar", f"{folder}/1.tar", f"{folder}/.x.tar", f"{folder}/@eaDir/2.tar")
    expected = [tmp_path / folder / "0.tar", tmp_path / folder / "1.tar"]
    for pattern in ("*.tar", "{0..1}.tar", "[01].tar"):
        assert expand_patterns(f"{tmp_path}/{folder}/{pattern}", "--train_data") == expected
    monkeypatch.chdir(tmp_path / folder)
    assert expand_patterns(absolute_patterns("*.tar"), "--train_data") == expected


def test_a_prefix_with_brackets_stays_one_path(tmp_path):
    (tmp_path / "my data [1]").mkdir()
    (tmp_path / "my data [1]" / "train_imgs.tsv").write_text("x")
    for place in ("my data [1]", "my data [1]/train", "my data [1]/train_imgs.tsv"):
        assert absolute_patterns(f"{tmp_path}/{place}") == f"{tmp_path}/{place}"
