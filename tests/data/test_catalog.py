"""Data sets by name, and the warning about unusual sizes."""

import subprocess
import sys

import numpy as np
import pytest

from clip_retrieval.data.catalog import READERS, size_warning
from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.errors import UserError


def dataset(name, split, images, captions):
    pairs = np.stack([np.arange(captions) % images, np.arange(captions)], axis=1)
    return RetrievalDataset(name, split, ImageFiles([""] * images), [""] * captions, pairs)


@pytest.mark.parametrize(
    ("name", "hint"), [("flickr30", "did you mean flickr30k"), ("COCO", "coco"), ("imagenet", "choose from coco, ")]
)
def test_an_unknown_name_suggests_the_nearest(tmp_path, read, name, hint):
    with pytest.raises(UserError, match=f"--dataset {name}: .*{hint}"):
        read(name, tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_each_reader_is_available(tmp_path, read, name):
    if name == "shapes":
        assert len(read(name, tmp_path).images) > 0
        return
    with pytest.raises(UserError, match="nowhere"):
        read(name, tmp_path / "nowhere")


def test_pycocotools_and_torch_are_not_imported_for_a_csv(tmp_path, photos):
    (tmp_path / "x.csv").write_text("image,caption\na.jpg,a dog\n")
    photos(tmp_path, "a.jpg")
    code = f"""
import sys
from clip_retrieval.data.catalog import read_dataset
from clip_retrieval.options import DataOptions
assert len(read_dataset(DataOptions(dataset="csv", dataset_root={str(tmp_path)!r}), "train").images) == 1
print([name for name in ("pycocotools", "torch") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "split", "images", "captions"),
    [
        ("coco", "test", 5_000, 25_000),
        ("coco", "test", 5_000, 25_010),
        ("coco", "train", 113_287, 566_435),
        ("coco", "train", 82_783, 413_915),
        ("flickr30k", "test", 1_000, 5_000),
        ("flickr30k", "val", 1_014, 5_070),
        ("flickr8k", "train", 6_000, 30_000),
        ("csv", "test", 3, 4),
    ],
)
def test_usual_sizes_give_no_warning(name, split, images, captions):
    assert size_warning(dataset(name, split, images, captions)) is None


def test_unusual_sizes_give_a_warning():
    warning = size_warning(dataset("coco", "test", 1_000, 5_000))
    assert "coco test" in warning and "\n" not in warning
    assert "1,000 images and 5,000 captions" in warning and "5,000 and 25,000" in warning
    assert "29,000 and 145,000" in size_warning(dataset("flickr30k", "train", 28_999, 144_995))


def test_the_real_sets_have_the_known_sizes(real_data, read):
    for split in ("train", "val", "test"):
        assert size_warning(read("flickr8k", real_data / "flickr8k", split)) is None
        assert "usual" in size_warning(read("coco", real_data / "coco_mini", split))
