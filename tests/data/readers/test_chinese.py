"""Chinese-CLIP's tsv and jsonl files, and the LMDB folders built from them, as data sets."""

import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch

from clip_retrieval.command_line import parse
from clip_retrieval.data.batches.loader import image_batches
from clip_retrieval.data.images import base64_images
from clip_retrieval.data.images.base64_images import TsvImages, infer_id_types
from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.data.pixels.cache import open_cached_pixels
from clip_retrieval.data.pixels.pixels import make_pixels
from clip_retrieval.data.writers.build_lmdb import build_lmdb
from clip_retrieval.errors import UserError
from clip_retrieval.run.merge import settle
from tests.conftest import read_json
from tests.data.make_chinese import ALPHABETS, content, photo, write_sample, write_split
from tests.models.small import small_preprocess

KINDS = ("tsv", "lmdb")


@pytest.fixture(params=KINDS)
def sample(request, tmp_path):
    """The folder of a data set with a test split, as tsv and jsonl or as LMDB alone."""
    write_sample(tmp_path / "files")
    if request.param == "tsv":
        return tmp_path / "files"
    build_lmdb(tmp_path / "files", ["test"], tmp_path / "built" / "lmdb")
    return tmp_path / "built"


# Content


def test_images_texts_and_pairs(sample, read):
    dataset = read("chinese", sample)
    assert (dataset.name, dataset.split) == ("chinese", "test")
    images, captions, pairs = content(dataset)
    assert images == {1000002: photo(1), 517602: photo(2), 9007199254740993: photo(3)}
    assert captions == {
        8428: "高级感托特包斜挎",
        8429: "雪地里的狗。",
        9223372036854775807: "“红色”的包",
        2: "红色的包",
    }
    assert pairs == [(1000002, 8428), (517602, 2), (517602, 8428), (517602, 9223372036854775807)]


def test_images_are_those_of_the_files(sample, tmp_path, read):
    dataset = read("chinese", sample)
    for index, encoded in enumerate(content(dataset)[0].values()):
        (tmp_path / "a.jpg").write_bytes(encoded)
        expected = ImageFiles([str(tmp_path / "a.jpg")])[0]
        assert dataset.images[index].mode == "RGB"
        assert np.array_equal(np.asarray(dataset.images[index]), np.asarray(expected))


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_both_alphabets_with_and_without_padding(tmp_path, read, alphabet, is_padded, kind):
    images = {i: photo(i) for i in range(6)}

    def encode(data):
        encoded = ALPHABETS[alphabet](data)
        return encoded if is_padded else encoded.rstrip(b"=")

    assert any(encode(image)[-1:] == b"=" for image in images.values()) == is_padded
    write_split(tmp_path, "test", images, [(0, "a", [0])], encode=encode)
    if kind == "lmdb":
        build_lmdb(tmp_path, ["test"])
    assert content(read("chinese", tmp_path))[0] == images


def test_line_ends_empty_lines_and_byte_order_marks_are_ignored(tmp_path, read):
    write_sample(tmp_path)
    plain = content(read("chinese", tmp_path))
    for path in tmp_path.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert content(read("chinese", tmp_path)) == plain


@pytest.mark.parametrize(
    "image_ids",
    [
        [2**63 - 1, -(2**63), 0, 2**70],
        ["a b.jpg", "folder/雪.jpg", "007", "1e3"],
        ["12", "13"],
        [12, "x", "007"],
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_keep_their_types(tmp_path, read, image_ids, kind):
    images = {image_id: photo(number) for number, image_id in enumerate(image_ids)}
    texts = [(image_id, f"text {image_id}", [image_id]) for image_id in image_ids]
    write_split(tmp_path, "test", images, texts)
    if kind == "lmdb":
        build_lmdb(tmp_path, ["test"])
    found = content(read("chinese", tmp_path))
    assert list(map(repr, sorted(found[0], key=str))) == list(map(repr, sorted(image_ids, key=str)))
    assert found == (images, {i: f"text {i}" for i in image_ids}, sorted(zip(image_ids, image_ids), key=repr))


def test_types_of_ids_without_texts_follow_the_named_ids():
    assert infer_id_types(["1", "2", "x", "03", "-4", "-", "0"], [1]) == [1, 2, "x", "03", -4, "-", 0]
    assert infer_id_types(["1", "2"], ["1"]) == ["1", "2"]
    assert infer_id_types(["1", "2", "x"], ["x"]) == [1, 2, "x"]


def test_lines_with_the_same_text_are_one_text(tmp_path, read):
    write_split(tmp_path, "test", {1: photo(1), 2: photo(2)}, [(7, "a", [1, 1]), (7, "a", [2])])
    dataset = read("chinese", tmp_path)
    assert dataset.captions == ["a"] and dataset.pairs.tolist() == [[0, 0], [1, 0]]


def test_a_text_that_is_a_number(tmp_path, read):
    write_split(tmp_path, "test", {1: photo(1)}, [(7, 2022, [1])])
    assert read("chinese", tmp_path).captions == ["2022"]


# Places


def test_splits_and_their_names(tmp_path, read):
    for number, name in enumerate(("train", "valid", "test")):
        write_split(tmp_path, name, {number: photo(number)}, [(0, name, [number])])
    for split, text in {"train": "train", "val": "valid", "test": "test"}.items():
        assert read("chinese", tmp_path, split).captions == [text]
    for path in tmp_path.glob("valid*"):
        path.rename(tmp_path / path.name.replace("valid", "dev"))
    assert read("chinese", tmp_path, "val").captions == ["valid"]
    for path in tmp_path.glob("test*"):
        path.unlink()
    assert read("chinese", tmp_path, "test") is None


def test_the_lmdb_takes_precedence(tmp_path, read):
    write_sample(tmp_path, "valid")
    build_lmdb(tmp_path, ["valid"])
    assert read("chinese", tmp_path, "val").images.path == tmp_path / "lmdb" / "valid" / "imgs"


def test_places_by_option(tmp_path, read):
    write_sample(tmp_path / "data", "valid")
    build_lmdb(tmp_path / "data", ["valid"], tmp_path / "elsewhere")
    expected = content(read("chinese", tmp_path / "data", "val"))
    data = tmp_path / "data"
    places = [
        tmp_path / "elsewhere" / "valid",
        data / "valid",
        data / "valid_imgs.tsv",
        data / "valid_texts.jsonl",
        data,
    ]
    for place in places:
        assert content(read("chinese", "nowhere", "val", val_data=place)) == expected
        assert content(read("chinese", "nowhere", "train", train_data=place if place != data else data / "valid"))
    # A split without an option comes from the root, if it has one.
    assert read("chinese", "nowhere", "train", val_data=data) is None
    assert content(read("chinese", data, "val", train_data=data / "valid")) == expected


def test_train_data_implies_the_data_set():
    def dataset_of(*layers):
        return settle(*layers).data.name

    typed = parse(["--train-data=DATA/lmdb/train", "--val-data=DATA/lmdb/valid"])
    assert typed == {"train_data": "DATA/lmdb/train", "val_data": "DATA/lmdb/valid"}
    assert dataset_of(typed) == "chinese"
    assert dataset_of({"dataset": "csv"}, typed) == "chinese", "a checkpoint's data set is overridden"
    with pytest.raises(UserError, match="--val_data is for --dataset chinese"):
        dataset_of(parse(["--dataset", "coco", "--val_data", "DATA"]))


# Texts without images


def test_a_split_without_answers_is_read(tmp_path, read):
    write_split(tmp_path, "test", {1: photo(1)}, [(5, "一", []), (6, "二")])
    for _ in KINDS:
        dataset = read("chinese", tmp_path)
        assert content(dataset) == ({1: photo(1)}, {5: "一", 6: "二"}, [])
        with pytest.raises(UserError, match="chinese, test split: no image has a caption"):
            dataset.require_pairs()
        build_lmdb(tmp_path, ["test"])


def write_run(folder, test_answers=True):
    for name, number in {"train": 12, "valid": 4, "test": 4}.items():
        images = {i: photo(i) for i in range(number)}
        answers = test_answers or name != "test"
        texts = [(i, f"a {i} thing", [i // 2] if answers else []) for i in range(2 * number)]
        write_split(folder, name, images, texts)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_finetune_and_an_evaluation(run, arguments, tmp_path, kind):
    data = write_run(tmp_path / "data")
    if kind == "lmdb":
        build_lmdb(data, ["train", "valid", "test"])
        for path in data.glob("*.*"):
            path.unlink()
    data_options = ("--dataset", "chinese", "--dataset_root", data)
    code, _, err = run(*arguments[4:], *data_options, "--num_workers", "2")
    assert code == 0, err
    results = read_json(tmp_path / "logs/ex0/results.json")
    assert (results["dataset"], results["images"], results["captions"]) == ("chinese", 4, 8)
    assert results["val"]["captions"] == 8
    # Data in another place, with the model of the checkpoint.
    place = data / "lmdb" / "valid" if kind == "lmdb" else data / "valid"
    evaluation = ("--eval", "--resume", tmp_path / "logs/ex0/best.pt", "--eval_split", "val")
    code, _, err = run(*evaluation, "--val_data", place, "--device", "cpu", "--num_workers", "0")
    assert code == 0, err
    again = read_json(tmp_path / "logs/ex0/eval_chinese_val/results.json")
    assert again["i2t"] == results["val"]["i2t"] and again["t2i"] == results["val"]["t2i"]


def test_a_checkpoint_finds_its_training_data(run, arguments, tmp_path, monkeypatch):
    write_run(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    named = [*arguments[4:], "--train_data", "data/train", "--val_data", "data/valid"]
    assert arguments[:2] == ["--dataset", "csv"]
    assert run(*named)[0] == 0
    monkeypatch.chdir("/")
    results = read_json(tmp_path / "logs/ex0/results.json")
    assert (results["dataset"], results["split"], results["captions"]) == ("chinese", "val", 8)
    evaluation = ("--eval", "--resume", tmp_path / "logs/ex0/best.pt", "--device", "cpu", "--num_workers", "0")
    assert run(*evaluation, "--eval_split", "val")[0] == 0
    again = read_json(tmp_path / "logs/ex0/eval_chinese_val/results.json")
    assert again["i2t"] == results["i2t"]
    code, _, err = run(*evaluation)
    assert code == 2 and f"chinese in {tmp_path / 'data/train'} has no test split" in err


def test_another_checkpoint_is_evaluated_on_a_named_split(run, arguments, tmp_path):
    assert run(*arguments, "--max_steps", "1")[0] == 0
    data = write_run(tmp_path / "data")
    evaluation = ("--eval", "--resume", tmp_path / "logs/ex0/best.pt", "--device", "cpu", "--num_workers", "0")
    code, _, err = run(*evaluation, "--val-data", data / "valid", "--eval_split", "val")
    assert code == 0, err
    assert read_json(tmp_path / "logs/ex0/eval_chinese_val/results.json")["captions"] == 8


def test_a_test_split_without_answers_is_not_scored(run, arguments, tmp_path):
    data = write_run(tmp_path / "data", test_answers=False)
    code, _, err = run(*arguments[4:], "--dataset", "chinese", "--dataset_root", data)
    assert code == 0 and "cannot be scored" in err, err
    assert read_json(tmp_path / "logs/ex0/results.json")["split"] == "val"
    code, _, err = run("--eval", "--resume", tmp_path / "logs/ex0/best.pt", "--device", "cpu")
    assert code == 2 and err.count("\n") == 1 and "chinese, test split: no image has a caption" in err


@pytest.mark.parametrize("name", ["train", "valid"])
def test_training_needs_answers(run, arguments, tmp_path, name):
    data = write_run(tmp_path / "data")
    write_split(data, name, {1: photo(1)}, [(5, "一", [])])
    code, _, err = run(*arguments[4:], "--dataset", "chinese", "--dataset_root", data)
    assert code == 2 and err.count("\n") == 1 and "no image has a caption" in err


# Invalid files and lines


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "dangling"])
def test_only_a_regular_tsv_is_read_without_waiting(tmp_path, kind):
    path = tmp_path / "test_imgs.tsv"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/nowhere")
    with pytest.raises(UserError, match=f"{path}: cannot be read"):
        TsvImages(path)


def test_a_line_longer_than_any_image_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(base64_images, "LONGEST_RECORD", 1000)
    (tmp_path / "a.tsv").write_bytes(b"1\t" + b"A" * 900 + b"\n" + b"xy\t" + b"A" * 2000)
    with pytest.raises(UserError, match=r"a\.tsv, line 2: longer than 1,000 bytes"):
        TsvImages(tmp_path / "a.tsv")


def test_an_image_id_of_thousands_of_digits_is_a_text(tmp_path, read):
    digits = "1" * 5000
    write_split(tmp_path, "test", {digits: photo(1), "7": photo(2)}, [(5, "一", [digits]), (6, "二", [7])])
    assert read("chinese", tmp_path).image_ids == [digits, 7]


# Other processes, and cached pixels


def test_other_processes_read_the_same(sample, read):
    images = read("chinese", sample).images
    pixels = make_pixels(images, small_preprocess())
    expected = pixels.batch(range(3), range(3))  # the LMDB is open here before a worker is forked
    forked = image_batches(pixels, [range(2), range(2, 3)] * 2, num_workers=2, pin_memory=False)
    assert torch.equal(torch.cat(list(forked)), torch.cat([expected] * 2))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(images.encoded, range(3)) == [images.encoded(i) for i in range(3)]


def test_tsv_images_keep_only_offsets(tmp_path):
    write_split(tmp_path, "test", {i: photo(i, side=100) for i in range(10)}, [])
    size = (tmp_path / "test_imgs.tsv").stat().st_size
    assert len(pickle.dumps(TsvImages(tmp_path / "test_imgs.tsv"))) < 1500 < size / 50


def test_the_image_cache_detects_a_change(sample, tmp_path, read):
    def cached():
        dataset = read("chinese", sample)
        return open_cached_pixels(dataset.images, small_preprocess(), tmp_path / "cache", "test", num_workers=0)

    expected = make_pixels(read("chinese", sample).images, small_preprocess()).batch(range(3), range(3))
    assert torch.equal(cached().batch(range(3), range(3)), expected)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".pixels"]
    write_sample(tmp_path / "files")
    tsv = tmp_path / "files" / "test_imgs.tsv"
    tsv.write_text(tsv.read_text().replace(*(_encoded(i) for i in (1, 4))))
    if sample.name == "built":
        build_lmdb(tmp_path / "files", ["test"], sample / "lmdb")
    new = make_pixels(read("chinese", sample).images, small_preprocess()).batch(range(3), range(3))
    assert not torch.equal(new, expected) and torch.equal(cached().batch(range(3), range(3)), new)


def _encoded(seed):
    return ALPHABETS["standard"](photo(seed)).decode()


# Errors: one line that names the file and the line


def fails(read, root, *parts, **options):
    with pytest.raises(UserError) as error:
        read("chinese", root, **options)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    for part in parts:
        assert str(part) in message, message


GOOD = b"1\t" + ALPHABETS["standard"](photo(1)) + b"\n"


@pytest.mark.parametrize(
    ("tsv", "message"),
    [
        (
            GOOD + b"2\tAAAA3\tBBBB\n",
            "line 2: holds several records (a line break is missing after image 2",
        ),
        (GOOD + b"\n2 AAAA\n", "line 3: not an image id, a tab and base64"),
        (GOOD + b"\tAAAA\n", "line 2: the image has no id"),
        (GOOD + b"2\t\n", "line 2: image 2 is empty"),
        (GOOD + b"\xff\tAAAA\n", "line 2: the image id b'\\xff' is not UTF-8"),
        (GOOD + b"5\tAAAA\n" + GOOD, "line 3: image 1 is on line 1 already"),
        (b"\n", "holds no images"),
        (bytes(1000), "line 1: not an image id"),
    ],
)
def test_bad_lines_of_a_tsv(tmp_path, read, tsv, message):
    write_sample(tmp_path)
    (tmp_path / "test_imgs.tsv").write_bytes(tsv)
    fails(read, tmp_path, tmp_path / "test_imgs.tsv", message)


LINE = b'{"text_id": 1, "text": "a", "image_ids": [1]}'


@pytest.mark.parametrize(
    ("jsonl", "message"),
    [
        (LINE + LINE, "line 1: several records are glued together"),
        (LINE + b"\n\n{]\n", "line 3: broken JSON"),
        (LINE + b'\n{"text_id": ' + b"1" * 5000 + b"}", "line 2: "),
        (b"[" * 100_000, "line 1: broken JSON"),
        (LINE + b"\n\xff", "line 2: not UTF-8 text (byte 0xff)"),
        (b"[1]", "line 1: not a JSON object, but a list"),
        (b'{"text": "a", "image_ids": [1]}', 'line 1: no "text_id"'),
        (b'{"text_id": true, "text": "a"}', 'line 1: no "text_id"'),
        (b'{"text_id": 1.5, "text": "a"}', 'line 1: no "text_id"'),
        (b'{"text_id": 1, "image_ids": [1]}', 'line 1: no "text"'),
        (b'{"text_id": 1, "text": "a", "image_ids": 1}', 'line 1: "image_ids" is not a list'),
        (b'{"text_id": 1, "text": "a", "image_ids": [null]}', 'line 1: "image_ids" is not a list'),
        (b'{"image_id": 1, "text_ids": [1]}', 'line 1: no "text_id"'),
        (LINE + b'\n{"text_id": 2, "text": "b", "image_ids": [1, 77]}', "line 2: there is no image 77 in"),
        (LINE + b'\n{"text_id": 1, "text": "b"}', "line 2: text 1 differs from line 1"),
        (b"", "holds no texts"),
    ],
)
def test_bad_lines_of_a_jsonl(tmp_path, read, jsonl, message):
    (tmp_path / "test_imgs.tsv").write_bytes(GOOD)
    (tmp_path / "test_texts.jsonl").write_bytes(jsonl)
    fails(read, tmp_path, tmp_path / "test_texts.jsonl", message)


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (b"AAAA", "not a readable image (none of the formats JPEG, PNG"),
        (b"AAAAA", "not base64"),
        (b"AA=AAA==", "not base64"),
        (b"AA!A", "not base64"),
        (ALPHABETS["standard"](photo(1)[:300]), "not a readable image"),
    ],
)
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, read, encoded, message):
    (tmp_path / "test_imgs.tsv").write_bytes(b"\n" + GOOD + b"xy\t" + encoded + b"\n")
    (tmp_path / "test_texts.jsonl").write_bytes(LINE)
    place = f"{tmp_path / 'test_imgs.tsv'}, line 3, image xy: "
    for _ in KINDS:
        images = read("chinese", tmp_path).images
        images[0]
        with pytest.raises(UserError) as error:
            images[1]
        assert str(error.value).startswith(place + message) and "\n" not in str(error.value)
        build_lmdb(tmp_path, ["test"])
        place = f"{tmp_path / 'lmdb/test/imgs'}, key xy: "


def test_missing_files(tmp_path, read):
    fails(read, tmp_path / "nowhere", tmp_path / "nowhere", "no such folder", "--dataset_root")
    fails(read, tmp_path, tmp_path, "lmdb/{train,valid,test}", "--val_data")
    fails(read, tmp_path, "--val_data", tmp_path / "x", "LMDB", split="val", val_data=tmp_path / "x")
    fails(read, tmp_path, "--train_data", tmp_path, "LMDB", split="train", train_data=tmp_path)
    write_sample(tmp_path)
    (tmp_path / "test_texts.jsonl").rename(tmp_path / "valid_texts.jsonl")
    fails(read, tmp_path, tmp_path / "test_texts.jsonl", "No such file")
    fails(read, tmp_path, tmp_path / "valid_imgs.tsv", "No such file", split="val")


def test_flickr8k_cn(real_data, tmp_path, read):
    """Real captions and photographs are read back unchanged."""
    root = real_data / "flickr8k"
    source = json.loads((root / "dataset_flickr8kcn.json").read_text())["images"]
    chosen = [image for image in source if image["split"] == "val"][:100]
    names = [image["filename"] for image in chosen]
    images = {i: (root / "images" / name).read_bytes() for i, name in enumerate(names)}
    texts = [(s["sentid"], s["raw"], [i]) for i, image in enumerate(chosen) for s in image["sentences"]]
    write_split(tmp_path, "valid", images, texts)
    dataset = read("chinese", tmp_path, "val")
    expected = {text_id: text.strip() for text_id, text, _ in texts}
    assert content(dataset)[:2] == (images, expected)
    files = ImageFiles([str(root / "images" / name) for name in names])
    assert all(np.array_equal(np.asarray(dataset.images[i]), np.asarray(files[i])) for i in range(0, 100, 9))
