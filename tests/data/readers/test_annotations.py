"""datasets/annotations equals the output of its script, and has the published sizes."""

import subprocess
import sys

import numpy as np

from clip_retrieval.data.readers import annotations
from tests.conftest import ROOT

SCRIPT = ROOT / "scripts" / "write_annotations.py"


def test_coco_lists():
    lists = {
        name: np.load(annotations.ANNOTATIONS / f"coco_{name}_ids.npy") for name in ("train", "restval", "dev", "test")
    }
    assert {name: len(ids) for name, ids in lists.items()} == {
        "train": 413_915,
        "restval": 152_520,
        "dev": 25_000,
        "test": 25_000,
    }
    assert all(ids.dtype == np.int32 for ids in lists.values())
    # No duplicate caption, within a list or between lists.
    assert len(np.unique(np.concatenate(list(lists.values())))) == 616_435


def test_flickr_lists():
    for name, sizes in {"flickr8k": (6_000, 1_000, 1_000), "flickr30k": (29_000, 1_014, 1_000)}.items():
        lists = [
            (annotations.ANNOTATIONS / f"{name}_{split}.txt").read_text().split() for split in ("train", "val", "test")
        ]
        assert tuple(map(len, lists)) == sizes
        assert len({image for images in lists for image in images}) == sum(sizes)


def test_the_script_writes_the_same_files(real_data, tmp_path):
    subprocess.run([sys.executable, SCRIPT, real_data, "--output", tmp_path], check=True, capture_output=True)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted(path.name for path in annotations.ANNOTATIONS.iterdir() if path.suffix != ".md")
    for name in written:
        assert (tmp_path / name).read_bytes() == (annotations.ANNOTATIONS / name).read_bytes(), name


def test_the_script_names_a_missing_folder(tmp_path):
    run = subprocess.run([sys.executable, SCRIPT, tmp_path / "nowhere"], capture_output=True, text=True)
    assert run.returncode == 2
    assert str(tmp_path / "nowhere") in run.stderr
