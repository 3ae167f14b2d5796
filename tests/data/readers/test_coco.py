"""The coco reader: three layouts of the same images, splits by id lists, captions files of the user."""

import json
import os

import numpy as np
import pytest

from clip_retrieval.data.readers import coco
from clip_retrieval.data.readers.coco import is_coco, read_captions
from clip_retrieval.errors import UserError
from clip_retrieval.files import read_json

# list -> image id -> annotation ids; image 30 has another caption, which is in no list.
SPLIT = {
    "train": {10: [7, 3], 11: [5]},
    "restval": {20: [21, 20]},
    "dev": {30: [30, 31]},
    "test": {41: [44, 43], 40: [40, 41]},
}
UNLISTED = {30: 99}


def image_names(style=2014):
    names = {}
    for name, images in SPLIT.items():
        folder = "train2014" if name == "train" else "val2014"
        for i in images:
            names[i] = f"COCO_{folder}_{i:012d}.jpg" if style == 2014 else f"{i:012d}.jpg"
    return names


def captions_json(image_ids, style=2014):
    """A captions file of these images, captions in any order."""
    names = image_names(style)
    owner = {a: i for images in SPLIT.values() for i, ids in images.items() for a in ids}
    owner |= {a: i for i, a in UNLISTED.items()}
    return {
        "images": [{"id": i, "file_name": names[i]} for i in image_ids],
        "annotations": [
            {"id": a, "image_id": i, "caption": f" caption {a}\n"} for a, i in sorted(owner.items()) if i in image_ids
        ],
    }


def write_json(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def write_ids(folder, split=SPLIT):
    folder.mkdir(parents=True, exist_ok=True)
    for name, images in split.items():
        np.save(folder / f"coco_{name}_ids.npy", np.array([a for ids in images.values() for a in ids], np.int32))


@pytest.fixture
def clip_itm(tmp_path, photos):
    """CLIP_ITM's layout."""
    root = tmp_path / "coco"
    write_json(root / "annotations" / "captions_train2014.json", captions_json([10, 11]))
    write_json(root / "annotations" / "captions_val2014.json", captions_json([20, 30, 40, 41]))
    write_ids(root / "annotations")
    photos(root / "images", *image_names().values())
    return root


EXPECTED = {
    "train": {10: ["caption 7", "caption 3"], 11: ["caption 5"], 20: ["caption 21", "caption 20"]},
    "val": {30: ["caption 30", "caption 31"]},
    "test": {41: ["caption 44", "caption 43"], 40: ["caption 40", "caption 41"]},
}


def expected(split, style=2014):
    return {image_names(style)[i]: captions for i, captions in EXPECTED[split].items()}


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_clip_itm_layout_in_the_order_of_the_id_lists(clip_itm, read, described, split):
    dataset = read("coco", clip_itm, split)
    assert (dataset.name, dataset.split) == ("coco", split)
    assert list(described(dataset).items()) == list(expected(split).items())
    assert dataset.images[0].size == (8, 8)


def test_ids_are_those_of_coco(clip_itm, read):
    dataset = read("coco", clip_itm)
    assert dataset.image_ids == [41, 40]
    assert [dataset.caption_name(i) for i in range(4)] == ["44", "43", "40", "41"]
    alone = read("coco", clip_itm, annotations=clip_itm / "annotations" / "captions_val2014.json")
    assert [f"caption {name}" for name in map(alone.caption_name, range(len(alone.captions)))] == alone.captions


def test_no_restval_limits_train_to_the_train_list(clip_itm, read, described):
    assert len(read("coco", clip_itm, "train", no_restval=True).images) == 2
    assert len(read("coco", clip_itm, "val", no_restval=True).images) == 1


def test_captions_may_be_in_the_root(clip_itm, read, described):
    for path in list((clip_itm / "annotations").iterdir()):
        path.rename(clip_itm / path.name)
    assert described(read("coco", clip_itm)) == expected("test")


@pytest.mark.parametrize("below", ["", "images"])
def test_official_2014_folders(clip_itm, tmp_path, photos, read, described, below):
    root = tmp_path / "official"
    (root / below).mkdir(parents=True)
    (clip_itm / "annotations").rename(root / "annotations")
    for name in image_names().values():
        photos(root / below / name.split("_")[1], name)
    for split in EXPECTED:
        assert described(read("coco", root, split)) == expected(split)


@pytest.mark.parametrize("below", ["", "images"])
@pytest.mark.parametrize("captions", [2014, 2017])
def test_2017_folders_are_matched_by_image_id(tmp_path, photos, read, described, below, captions):
    root = tmp_path / "coco17"
    write_ids(root / "annotations")
    if captions == 2017:
        write_json(root / "annotations" / "captions_train2017.json", captions_json([10, 11, 20, 40], 2017))
        write_json(root / "annotations" / "captions_val2017.json", captions_json([30, 41], 2017))
    else:
        write_json(root / "annotations" / "captions_train2014.json", captions_json([10, 11]))
        write_json(root / "annotations" / "captions_val2014.json", captions_json([20, 30, 40, 41]))
    photos(root / below / "train2017", *(image_names(2017)[i] for i in (10, 11, 20, 40)))
    photos(root / below / "val2017", *(image_names(2017)[i] for i in (30, 41)))
    for split in EXPECTED:
        dataset = read("coco", root, split)
        assert list(described(dataset).items()) == list(expected(split, 2017).items())
    assert "val2017" in dataset.images.name(0) and "train2017" in dataset.images.name(1)


def test_image_dir_replaces_the_folders_of_the_root(clip_itm, tmp_path, read, described):
    (clip_itm / "images").rename(tmp_path / "elsewhere")
    dataset = read("coco", clip_itm, image_dir=tmp_path / "elsewhere")
    assert described(dataset) == expected("test")


def test_missing_id_lists_come_from_the_project(clip_itm, tmp_path, read, described, monkeypatch):
    write_ids(tmp_path / "project")
    for path in (clip_itm / "annotations").glob("*.npy"):
        path.unlink()
    monkeypatch.setattr(coco, "ANNOTATIONS", tmp_path / "project")
    assert described(read("coco", clip_itm)) == expected("test")


def test_only_the_captions_of_the_split_are_parsed(clip_itm, read):
    (clip_itm / "annotations" / "captions_train2014.json").write_text("broken")
    assert read("coco", clip_itm, "test") is not None
    with pytest.raises(UserError, match="captions_train2014"):
        read("coco", clip_itm, "train")


def test_karpathy_json_is_the_fallback(tmp_path, photos, read, described):
    name = image_names()[40]
    image = {"filepath": "val2014", "filename": name, "split": "test", "sentences": [{"raw": "a cat"}]}
    write_json(tmp_path / "dataset_coco.json", {"images": [image]})
    photos(tmp_path / "val2014", name)
    assert described(read("coco", tmp_path)) == {name: ["a cat"]}
    dataset = read("coco", "nowhere", annotations=tmp_path / "dataset_coco.json")
    assert described(dataset) == {name: ["a cat"]}


# --annotations


def test_own_annotations_have_no_splits(tmp_path, photos, read, described):
    # The ids are valid in COCO too, as low ids often are.
    own = {
        "images": [
            {"id": 5, "file_name": "x.png"},
            {"id": 6, "file_name": "sub/y.jpg"},
            {"id": 7, "file_name": "z.jpg"},
        ],
        "annotations": [
            {"id": 40, "image_id": 6, "caption": "first"},
            {"id": 37, "image_id": 5, "caption": "second"},
            {"id": 41, "image_id": 6, "caption": "first"},
        ],
    }
    write_json(tmp_path / "own.json", own)
    photos(tmp_path / "pictures", "x.png", "sub/y.jpg", "z.jpg")
    files = {"annotations": tmp_path / "own.json", "image_dir": tmp_path / "pictures"}
    for split in ("train", "test"):
        dataset = read("coco", "nowhere", split, **files)
        assert described(dataset) == {"x.png": ["second"], "y.jpg": ["first", "first"], "z.jpg": []}
    assert read("coco", "nowhere", "val", **files) is None
    # Images beside the captions file need no --image_dir.
    (tmp_path / "pictures").rename(tmp_path / "images")
    assert len(read("coco", "nowhere", annotations=tmp_path / "own.json").images) == 3


def test_annotations_of_coco_are_split_by_the_lists(real_data, read):
    root = real_data / "coco_mini"
    files = {"annotations": root / "annotations" / "captions_val2014.json", "image_dir": root / "images"}
    sizes = {split: len(read("coco", "nowhere", split, **files).images) for split in EXPECTED}
    assert sizes == {"train": 234, "val": 36, "test": 42}
    assert read("coco", "nowhere", "train", no_restval=True, **files) is None


def test_other_captions_of_coco_images_are_not_coco(real_data, tmp_path):
    data = json.loads((real_data / "coco_mini" / "annotations" / "captions_val2014.json").read_text())
    assert is_coco(read_captions(real_data / "coco_mini" / "annotations" / "captions_val2014.json"))
    for number, annotation in enumerate(data["annotations"]):
        annotation["id"] = number
    write_json(tmp_path / "translated.json", data)
    assert not is_coco(read_captions(tmp_path / "translated.json"))


# Real data


def test_coco_mini(real_data, read):
    root = real_data / "coco_mini"
    sizes = {split: len(read("coco", root, split).images) for split in EXPECTED}
    assert sizes == {"train": 294, "val": 36, "test": 42}
    assert len(read("coco", root, "train", no_restval=True).images) == 60
    for split in EXPECTED:
        dataset = read("coco", root, split)
        assert np.bincount(dataset.pairs[:, 0]).tolist() == [5] * len(dataset.images)
        dataset.images[len(dataset.images) - 1].load()


def letters(text):
    """Keep letters and digits: the two sources differ in blanks and punctuation."""
    return "".join(c for c in text.lower() if c.isalnum())


def test_coco_mini_agrees_with_karpathys_captions(real_data, read):
    karpathy = read_json(real_data / "coco_text" / "dataset_coco_karpathy_test.json.gz")
    texts = {s["sentid"]: letters(s["raw"]) for image in karpathy["images"] for s in image["sentences"]}
    dataset = read("coco", real_data / "coco_mini")
    ids = np.load(real_data / "coco_mini" / "annotations" / "coco_test_ids.npy")
    assert [letters(caption) for caption in dataset.captions] == [texts[i] for i in ids.tolist()]


# Bad input: one line that names the file


def fails(read, root, *parts, split="test", **options):
    with pytest.raises(UserError) as error:
        read("coco", root, split, **options)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


def test_missing_root(tmp_path, read):
    fails(read, tmp_path / "nowhere", tmp_path / "nowhere", "--dataset_root")


def test_missing_captions_file(clip_itm, read):
    path = clip_itm / "annotations" / "captions_val2014.json"
    path.unlink()
    fails(read, clip_itm, path, "--annotations")
    fails(read, clip_itm, "own.json", annotations="own.json")


def test_missing_images(clip_itm, read):
    (clip_itm / "images" / image_names()[41]).unlink()
    fails(read, clip_itm, "captions_val2014.json", clip_itm / "images" / image_names()[41], "1 of the 2", "--image_dir")
    (clip_itm / "images").rename(clip_itm / "pictures")
    fails(read, clip_itm, image_names()[41], "2 of the 2")


def test_broken_json_names_the_line(clip_itm, read):
    path = clip_itm / "annotations" / "captions_val2014.json"
    path.write_text('{"images": [],\n "annotations": [}')
    fails(read, clip_itm, path, "line 2")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1, 2], "list"),
        ({"images": [], "categories": []}, '"annotations"'),
        ({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}, "no captions"),
        # An instances file: boxes and no captions.
        (
            {
                "images": [{"id": 1, "file_name": "a.jpg"}],
                "annotations": [{"id": 1, "image_id": 1, "bbox": [0, 0, 1, 1]}],
            },
            'annotations[0] has no "caption"',
        ),
        ({"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1, "caption": "a"}]}, '"file_name"'),
        ({"images": [], "annotations": [{"id": 8, "image_id": 5, "caption": "a"}]}, "image 5"),
        (
            {
                "images": [{"id": 1, "file_name": "a.jpg"}],
                "annotations": [{"id": 8, "image_id": 1, "caption": "a"}, {"id": 8, "image_id": 1, "caption": "b"}],
            },
            "same id",
        ),
    ],
)
def test_json_of_another_kind(clip_itm, read, data, message):
    path = clip_itm / "annotations" / "captions_val2014.json"
    write_json(path, data)
    fails(read, clip_itm, path, message)


def test_ids_missing_in_the_captions_file(clip_itm, read):
    write_ids(clip_itm / "annotations", {"test": {40: [40, 123456, 123457]}})
    folder = clip_itm / "annotations"
    fails(read, clip_itm, folder / "coco_test_ids.npy", folder / "captions_val2014.json", "2 of its 3", "123456")


class Evil:
    def __reduce__(self):
        return os.system, ("touch should_never_be_made",)


@pytest.mark.parametrize(
    "ids", [np.array([Evil()], object), np.array([1.5]), np.array(["a"]), np.array([[1, 2]]), None]
)
def test_invalid_id_lists(clip_itm, read, ids, monkeypatch):
    monkeypatch.chdir(clip_itm)
    path = clip_itm / "annotations" / "coco_test_ids.npy"
    if ids is None:
        path.write_bytes(b"")
    else:
        np.save(path, ids, allow_pickle=True)
    fails(read, clip_itm, path, "numpy.save")
    assert not (clip_itm / "should_never_be_made").exists()


def test_wrong_encoding_names_the_line(clip_itm, read):
    path = clip_itm / "annotations" / "captions_val2014.json"
    path.write_bytes('{"images": [],\n"x": "café"}'.encode("latin-1"))
    fails(read, clip_itm, path, "line 2", "UTF-8")
