"""Karpathy's JSON, and the captions files of Flickr8K and Flickr30K in circulation."""

import gzip
import json
import time

import numpy as np
import pytest

from clip_retrieval.data.readers import karpathy
from clip_retrieval.errors import UserError

IMAGES = [
    {"filename": "a.jpg", "split": "train", "sentences": [{"raw": " a dog\nruns "}, {"raw": "a brown dog"}]},
    {"filename": "b.jpg", "split": "restval", "sentences": [{"raw": "a cat"}]},
    {"filename": "c.jpg", "split": "val", "sentences": [{"raw": "a bus"}, {"raw": "a bus"}]},
    {"filename": "d.jpg", "split": "test", "sentences": [{"raw": "a red bus"}]},
    {"filename": "e.jpg", "split": "test", "sentences": []},
]
NAMES = [image["filename"] for image in IMAGES]
EXPECTED = {
    "train": {"a.jpg": ["a dog runs", "a brown dog"], "b.jpg": ["a cat"]},
    "val": {"c.jpg": ["a bus", "a bus"]},
    "test": {"d.jpg": ["a red bus"], "e.jpg": []},
}


def write_json(path, images=IMAGES):
    data = json.dumps({"images": images, "dataset": "flickr8k"}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def lists(tmp_path, monkeypatch):
    """Split lists of the same images, in place of the project's."""
    folder = tmp_path / "lists"
    folder.mkdir()
    for split, names in {"train": "a.jpg b.jpg", "val": "c.jpg", "test": "d.jpg gone.jpg"}.items():
        for name in karpathy.FLICKR:
            (folder / f"{name}_{split}.txt").write_text("\n".join(names.split()) + "\n")
    monkeypatch.setattr(karpathy, "ANNOTATIONS", folder)


@pytest.mark.parametrize("name", ["flickr8k", "flickr30k", "karpathy"])
@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_json_in_the_root(tmp_path, photos, read, described, name, suffix):
    write_json(tmp_path / f"dataset_{name}{suffix}")
    photos(tmp_path / "images", *NAMES)
    for split in EXPECTED:
        dataset = read(name, tmp_path, split)
        assert (dataset.name, dataset.split) == (name, split)
        # An image without captions stays, as one to be retrieved.
        assert list(described(dataset).items()) == list(EXPECTED[split].items())


def test_ids_unless_one_is_missing_or_duplicate(tmp_path, photos, read):
    photos(tmp_path, *NAMES)
    number = iter(range(10, 100))
    images = [{**image, "cocoid": next(number)} for image in IMAGES]
    for image in images:
        image["sentences"] = [{**sentence, "sentid": next(number)} for sentence in image["sentences"]]
    write_json(tmp_path / "dataset_my.json", images)
    train = read("karpathy", tmp_path, "train")
    assert (train.image_ids, train.text_ids) == ([10, 11], [15, 16, 17])
    images[1]["cocoid"] = 10
    del images[0]["sentences"][0]["sentid"]
    write_json(tmp_path / "ids" / "dataset_my.json", images)
    train = read("karpathy", tmp_path / "ids", "train", image_dir=tmp_path)
    assert train.image_ids is train.text_ids is None and train.caption_name(2) == "2"


def test_no_restval(tmp_path, photos, read, described):
    write_json(tmp_path / "dataset_my.json")
    photos(tmp_path, *NAMES)
    assert list(described(read("karpathy", tmp_path, "train", no_restval=True))) == ["a.jpg"]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("flickr8k", "images"),
        ("flickr8k", ""),
        ("flickr8k", "Images"),
        ("flickr8k", "Flicker8k_Dataset"),
        ("flickr30k", "flickr30k-images"),
        ("flickr30k", "flickr30k_images"),
        ("flickr30k", "flickr30k_images/flickr30k_images"),
        ("flickr30k", "Images"),
    ],
)
def test_folders_of_the_images(tmp_path, photos, read, name, folder):
    write_json(tmp_path / f"dataset_{name}.json")
    photos(tmp_path / folder, *NAMES)
    assert read(name, tmp_path).images.name(0) == str(tmp_path / folder / "d.jpg")


@pytest.mark.parametrize("layout", ["val2014/d.jpg", "images/val2014/d.jpg", "images/d.jpg"])
def test_filepath_is_a_folder_or_is_ignored(tmp_path, photos, read, layout):
    write_json(tmp_path / "dataset_coco.json", [{**IMAGES[3], "filepath": "val2014"}])
    photos(tmp_path, layout)
    assert read("karpathy", tmp_path).images.name(0) == str(tmp_path / layout)


def test_annotations_and_image_dir(tmp_path, photos, read, described):
    path = write_json(tmp_path / "somewhere" / "my.json")
    photos(tmp_path / "pictures", *NAMES)
    files = {"annotations": path, "image_dir": tmp_path / "pictures"}
    for name in ("karpathy", "flickr8k"):
        assert described(read(name, "nowhere", **files)) == EXPECTED["test"]


def test_no_such_split(tmp_path, photos, read):
    write_json(tmp_path / "dataset_flickr8k.json", IMAGES[3:])
    photos(tmp_path, *NAMES)
    assert read("flickr8k", tmp_path, "train") is None
    assert read("flickr8k", tmp_path, "val") is None


# Captions files

RESULTS_CSV = """image_name| comment_number| comment
d.jpg| 0| A red bus | or a tram .
d.jpg| 1   A dog runs across the grass .
unlisted.jpg| 0| Not in the split .
a.jpg| 0| A dog .\r
"""
CAPTIONS_TXT = """image,caption
d.jpg,"A red , ""old"" bus ."
d.jpg,A bus .
unlisted.jpg,Not in the split .
a.jpg,A dog .
"""
TOKEN = "d.jpg#0\tA red bus .\nd.jpg#1\tA bus .\nunlisted.jpg.1#0\tx\na.jpg#0\tA dog .\n"
COMMA = "image_name,comment_number,comment\nd.jpg,0,A red bus .\nd.jpg,1,A bus .\na.jpg,0,A dog .\n"


@pytest.mark.parametrize(
    ("name", "file", "text", "captions"),
    [
        ("flickr30k", "results.csv", RESULTS_CSV, ["A red bus | or a tram .", "A dog runs across the grass ."]),
        ("flickr30k", "flickr30k_images/results.csv", RESULTS_CSV, None),
        ("flickr30k", "results_20130124.token", TOKEN, ["A red bus .", "A bus ."]),
        ("flickr30k", "captions.csv", COMMA, ["A red bus .", "A bus ."]),
        ("flickr8k", "captions.txt", CAPTIONS_TXT, ['A red , "old" bus .', "A bus ."]),
        ("flickr8k", "Flickr8k.token.txt", TOKEN, ["A red bus .", "A bus ."]),
    ],
)
def test_captions_files_with_the_projects_split(tmp_path, photos, read, described, lists, name, file, text, captions):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    photos(tmp_path / "Images", "a.jpg", "d.jpg")
    test = described(read(name, tmp_path))
    assert list(test) == ["d.jpg"]
    assert captions is None or test["d.jpg"] == captions
    assert described(read(name, tmp_path, "train")) == {"a.jpg": ["A dog ."]}
    assert read(name, tmp_path, "val") is None


def test_captions_file_by_option(tmp_path, photos, read, described, lists):
    (tmp_path / "mine.csv").write_text(RESULTS_CSV)
    photos(tmp_path / "p", "a.jpg", "d.jpg")
    dataset = read("flickr30k", "nowhere", annotations=tmp_path / "mine.csv", image_dir=tmp_path / "p")
    assert len(dataset.captions) == 2


# Real data


def test_flickr8k(real_data, read):
    root = real_data / "flickr8k"
    for split, size in {"train": 6000, "val": 1000, "test": 1000}.items():
        dataset = read("flickr8k", root, split)
        assert (len(dataset.images), len(dataset.captions)) == (size, 5 * size)
        assert np.bincount(dataset.pairs[:, 0]).tolist() == [5] * size
    assert dataset.images[0].size == (224, 224)
    chinese = read("flickr8k", root, annotations=root / "dataset_flickr8kcn.json")
    assert chinese.images.paths == dataset.images.paths


def test_a_captions_file_equals_the_json(real_data, tmp_path, read):
    parts = karpathy.read_karpathy_json(real_data / "flickr30k_text" / "dataset_flickr30k.json.gz")
    assert {split: len(images) for split, images in parts.items()} == {"train": 29_000, "val": 1_014, "test": 1_000}
    lines = ["image_name| comment_number| comment"]
    for images in parts.values():
        lines += [f"{image.name}| 0| {text}" for image in images for text in image.texts]
    (tmp_path / "results.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = karpathy.read_captions(tmp_path / "results.csv", "flickr30k")
    assert {split: [image[:3] for image in images] for split, images in found.items()} == {
        split: [image[:3] for image in images] for split, images in parts.items()
    }


# Bad input: one line that names the file


def fails(read, name, root, *parts, **options):
    with pytest.raises(UserError) as error:
        read(name, root, **options)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


@pytest.mark.parametrize("name", ["flickr8k", "karpathy"])
def test_missing_root_and_files(tmp_path, read, name):
    fails(read, name, tmp_path / "nowhere", tmp_path / "nowhere", "--dataset_root")
    fails(read, name, tmp_path, "dataset_", "--annotations")
    fails(read, name, tmp_path, "gone.json", annotations="gone.json")


def test_several_json_files(tmp_path, read):
    write_json(tmp_path / "dataset_a.json")
    write_json(tmp_path / "dataset_b.json")
    fails(read, "karpathy", tmp_path, tmp_path, "dataset_a.json, dataset_b.json", "--annotations")


def test_missing_images(tmp_path, photos, read):
    path = write_json(tmp_path / "dataset_flickr8k.json")
    photos(tmp_path / "images", "d.jpg")
    fails(read, "flickr8k", tmp_path, path, tmp_path / "images" / "e.jpg", "1 of 2 images is missing", "--image_dir")
    fails(read, "flickr8k", tmp_path, path, "nowhere/d.jpg", "2 of 2 images are missing", image_dir="nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{]", "line 1"),
        (b"[]", '"images"'),
        (b'{"images": []}', "no images"),
        (b'{"images": [7]}', "images[0]"),
        # A captions file of COCO.
        (b'{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}', '"filename"'),
        (b'{"images": [{"filename": "a.jpg", "sentences": []}]}', "a.jpg, has the split None"),
        (b'{"images": [{"filename": "a.jpg", "split": "exam", "sentences": []}]}', "'exam'"),
        (b'{"images": [{"filename": "a.jpg", "split": "test"}]}', 'no "sentences"'),
        (b'{"images": [{"filename": "a.jpg", "split": "test", "sentences": ["a dog"]}]}', '"raw"'),
        (b'{"images": [{"filename": "a.jpg", "split": "test", "sentences": []}]}', "has a caption"),
        ('{"images":\n\n "é"}'.encode("latin-1"), "line 3"),
    ],
)
def test_json_that_is_not_karpathys(tmp_path, read, content, message):
    path = tmp_path / "dataset_flickr8k.json"
    path.write_bytes(content)
    fails(read, "flickr8k", tmp_path, path, message)


def test_broken_gzip(tmp_path, read):
    path = write_json(tmp_path / "dataset_flickr8k.json.gz")
    path.write_bytes(path.read_bytes()[:-20])
    fails(read, "flickr8k", tmp_path, path, "gzip")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_name| comment_number| comment\nd.jpg| 0| A .\nd.jpg\n", "line 3"),
        ("image_name| comment_number| comment\n| 0| A caption without image .\n", "line 2"),
        ("d.jpg#0\tA bus .\nA bus .\n", "line 2"),
        ("image,caption\nd.jpg\n", "line 2"),
        ("image,text\nd.jpg,A bus .\n", "image, text"),
        ("image,caption\nother.jpg,A bus .\n", "--dataset csv"),
        ("image,caption\n", "no captions"),
        ("", "columns found: none"),
    ],
)
def test_bad_captions_files(tmp_path, read, lists, text, message):
    path = tmp_path / "captions.txt"
    path.write_text(text)
    fails(read, "flickr8k", tmp_path, path, message)


def test_a_captions_file_is_refused_as_karpathy(tmp_path, read):
    (tmp_path / "x.csv").write_text(CAPTIONS_TXT)
    fails(read, "karpathy", tmp_path, tmp_path / "x.csv", ".json", annotations=tmp_path / "x.csv")


@pytest.mark.parametrize("line", ["a.jpg| 1" + " " * 10**5, " " * 10**5 + "a.jpg" + " " * 10**5, "a" + "| 1" * 10**5])
@pytest.mark.parametrize("header", ["image_name| comment_number| comment", "a.jpg#0\ta dog"])
def test_long_lines_of_captions_files_take_linear_time(tmp_path, read, header, line):
    (tmp_path / "results.csv").write_text(f"{header}\n{line}\n")
    began = time.process_time()
    with pytest.raises(UserError, match=r"results\.csv"):
        read("flickr8k", tmp_path)
    assert time.process_time() - began < 5
