"""Images held out for val and test, and what is left out of a data set."""

import json

import numpy as np
import pytest

from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.data.selection import hold_out, select
from clip_retrieval.errors import UserError
from clip_retrieval.log import log

FRACTIONS = {"val_fraction": 0.2, "test_fraction": 0.3}


@pytest.fixture
def table(tmp_path, photos):
    """table(number) writes a CSV of so many images, two captions each, the second ones at its end."""
    photos(tmp_path, *(f"{i}.jpg" for i in range(60)))

    def write(name, numbers):
        rows = [f"{i}.jpg,{word} {i}" for word in ("first", "second") for i in numbers]
        (tmp_path / name).write_text("image,caption\n" + "\n".join(rows) + "\n")
        return tmp_path / name

    return write


def read_all(read, described, path, **options):
    options = FRACTIONS | options
    return {
        split: dataset and described(dataset)
        for split in ("train", "val", "test")
        for dataset in [read("csv", path.parent, split, annotations=path, **options)]
    }


def test_held_out_splits_are_a_partition_by_whole_images(table, read, described):
    found = read_all(read, described, table("x.csv", range(60)))
    union = found["train"] | found["val"] | found["test"]
    assert union == {f"{i}.jpg": [f"first {i}", f"second {i}"] for i in range(60)}
    assert sum(map(len, found.values())) == 60
    assert 4 <= len(found["val"]) <= 20 and 10 <= len(found["test"]) <= 26


def test_further_rows_and_another_order_move_no_image(table, read, described, tmp_path):
    before = read_all(read, described, table("x.csv", range(40)))
    after = read_all(read, described, table("y.csv", range(59, -1, -1)))
    for split, images in before.items():
        assert images.items() <= after[split].items()


def test_test_split_does_not_depend_on_the_val_fraction(table, read, described):
    path = table("x.csv", range(60))
    one, other = (read_all(read, described, path, val_fraction=fraction) for fraction in (0.2, 0.4))
    assert one["test"] == other["test"] and one["val"].items() < other["val"].items()
    without = read_all(read, described, path, val_fraction=0.0)
    assert without["val"] is None and without["test"] == one["test"]
    assert without["train"].keys() == one["train"].keys() | one["val"].keys()


def test_names_of_other_systems_are_in_the_same_split(table, read, described, photos, tmp_path):
    photos(tmp_path, *(f"sub/{i}.jpg" for i in range(60)))
    for name, slash in (("x.csv", "/"), ("y.csv", "\\")):
        rows = "".join(f"sub{slash}{i}.jpg,caption {i}\n" for i in range(60))
        (tmp_path / name).write_text(f"image,caption\n{rows}")
    one, other = (read_all(read, described, tmp_path / name) for name in ("x.csv", "y.csv"))
    assert one == other


def test_a_split_column_is_kept_and_only_a_missing_split_is_held_out(tmp_path, photos, read, described):
    photos(tmp_path, *(f"{i}.jpg" for i in range(40)))
    rows = "".join(f"{i}.jpg,caption {i},{'test' if i < 10 else 'train'}\n" for i in range(40))
    (tmp_path / "x.csv").write_text(f"image,caption,split\n{rows}")
    found = read_all(read, described, tmp_path / "x.csv", val_fraction=0.5, test_fraction=0.0)
    assert found["test"].keys() == {f"{i}.jpg" for i in range(10)}
    assert found["train"].keys() | found["val"].keys() == {f"{i}.jpg" for i in range(10, 40)}
    with pytest.raises(UserError, match=r"--test_fraction.*has a test split already"):
        read("csv", tmp_path, "test", test_fraction=0.5)


def test_captions_of_the_user_in_the_format_of_coco_are_held_out(tmp_path, photos, read):
    photos(tmp_path, *(f"{i}.jpg" for i in range(40)))
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(40)],
        "annotations": [{"id": i, "image_id": i, "caption": f"caption {i}"} for i in range(40)],
    }
    (tmp_path / "mine.json").write_text(json.dumps(content))
    options = FRACTIONS | {"annotations": tmp_path / "mine.json"}
    datasets = [read("coco", tmp_path, split, **options) for split in ("train", "val", "test")]
    assert sum(len(dataset.images) for dataset in datasets) == 40
    assert [dataset.split for dataset in datasets] == ["train", "val", "test"]
    val = datasets[1]
    assert val.images[0].size == (8, 8) and val.images.encoded(0)[:2] == b"\xff\xd8" and val.images.stamp(0)[0] > 0


def test_a_split_without_images_is_refused(table, read):
    path = table("x.csv", range(2))
    with pytest.raises(UserError, match=r"--val_fraction 0\.001: none of 2 images"):
        read("csv", path.parent, "val", annotations=path, val_fraction=0.001)


def test_captions_of_other_images_are_not_selected(table, read):
    whole = read("csv", table("x.csv", range(60)).parent, "train", annotations=table("x.csv", range(60)))
    images = np.arange(60) < 30
    part = select(whole, images, np.ones(len(whole.captions), bool), "train")
    assert len(part.captions) == 120 and part.pairs[:, 0].max() == 29
    part = hold_out(whole, "train", {"val": 0.5, "test": 0.0})
    assert len(part.captions) == 2 * len(part.images) == len(part.pairs)


@pytest.mark.parametrize("kind", ["coco", "karpathy", "csv", "flickr8k"])
def test_empty_captions_are_left_out_alike_by_all_readers(tmp_path, photos, read, described, caplog, kind):
    names = ["1000268201_693b08cb0e.jpg", "1001773457_577c3a7d70.jpg", "1002674143_1b742ab4b8.jpg"]
    photos(tmp_path, *names)
    texts = {names[0]: ["", "a dog"], names[1]: [" "], names[2]: ["a bus"]}
    rows = [(name, text) for name in names for text in texts[name]]
    if kind == "coco":
        annotations = [{"id": i, "image_id": names.index(n), "caption": t} for i, (n, t) in enumerate(rows)]
        images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
        (tmp_path / "x.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    elif kind == "karpathy":
        images = [
            {"filename": n, "split": "train", "sentences": [{"raw": text} for text in t]} for n, t in texts.items()
        ]
        (tmp_path / "dataset_x.json").write_text(json.dumps({"images": images}))
    elif kind == "csv":
        (tmp_path / "x.csv").write_text("image,caption\n" + "".join(f"{n},{t}\n" for n, t in rows))
    else:
        (tmp_path / "results.csv").write_text("name| number| comment\n" + "".join(f"{n}| 0| {t}\n" for n, t in rows))
    log.propagate = True
    with caplog.at_level("WARNING", "clip_retrieval"):
        options = {"annotations": tmp_path / "x.json"} if kind == "coco" else {}
        dataset = read(kind, tmp_path, "train", **options)
    assert described(dataset) == {names[0]: ["a dog"], names[2]: ["a bus"]}
    assert "2 of 4 captions are empty and left out; so are images without another caption: 1" in caplog.text


def test_one_file_under_two_names_is_in_one_split():
    names = [name for i in range(40) for name in (f"im/{i}.jpg", f"/data/im/{i}.jpg", f"other/../im/{i}.jpg")]
    images = ImageFiles([f"/data/im/{i // 3}.jpg" for i in range(len(names))], names)
    pairs = np.stack([np.arange(len(names))] * 2, axis=1)
    dataset = RetrievalDataset("coco", "all", images, [f"caption {i}" for i in range(len(names))], pairs)
    fractions = {"val": 0.3, "test": 0.3}
    parts = [hold_out(dataset, split, fractions).images for split in ("train", "val", "test")]
    files = [{part.name(i) for i in range(len(part))} for part in parts]
    assert sum(map(len, files)) == len(set.union(*files)) == 40
