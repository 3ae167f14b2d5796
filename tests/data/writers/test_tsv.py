"""scripts/export_tsv.py: any data set as tsv and jsonl; reading them returns the same data."""

import subprocess
import sys

import numpy as np
import pytest

from clip_retrieval.data.writers import tsv as exporting
from clip_retrieval.data.writers.tsv import export
from clip_retrieval.errors import UserError
from clip_retrieval.options import DataOptions
from tests.conftest import ROOT
from tests.data.make_chinese import write_sample


@pytest.fixture
def options(captioned):
    return DataOptions(dataset="csv", dataset_root=str(captioned))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_are_read_back_unchanged(options, captioned, tmp_path, read):
    export(options, tmp_path)
    assert names(tmp_path) == sorted(
        f"{s}_{n}" for s in ("train", "valid", "test") for n in ("imgs.tsv", "texts.jsonl")
    )
    for split in ("train", "val", "test"):
        source, dataset = read("csv", captioned, split), read("chinese", tmp_path, split)
        assert dataset.captions == source.captions and np.array_equal(dataset.pairs, source.pairs)
        assert dataset.image_ids == list(range(len(source.images))) and dataset.text_ids == list(
            range(len(source.captions))
        )
        assert [dataset.images.encoded(i) for i in dataset.image_ids] == [
            source.images.encoded(i) for i in dataset.image_ids
        ], "the bytes of the files"


def test_names_of_splits_and_of_images(options, captioned, tmp_path, read):
    export(options, tmp_path, ["val", "test"], ids="name")
    assert names(tmp_path) == ["test_imgs.tsv", "test_texts.jsonl", "val_imgs.tsv", "val_texts.jsonl"]
    assert read("chinese", tmp_path, "val").image_ids == list(range(14, 20))
    (tmp_path / "photos").mkdir()
    rows = ["image,caption", "a b.jpg,one", "007.jpg,two"]
    for name in ("a b", "007"):
        (tmp_path / "photos" / f"{name}.jpg").write_bytes((captioned / "0.jpg").read_bytes())
    (tmp_path / "photos.csv").write_text("\n".join(rows))
    own = DataOptions(dataset="csv", annotations=str(tmp_path / "photos.csv"), image_dir=str(tmp_path / "photos"))
    export(own, tmp_path / "own", ids="name")
    assert names(tmp_path / "own") == ["train_imgs.tsv", "train_texts.jsonl"], "a data set without splits"
    assert read("chinese", tmp_path / "own", "train").image_ids == ["a b", "007"]
    export(own, tmp_path / "own", ["test"])
    assert read("chinese", tmp_path / "own", "test").captions == ["one", "two"]


def test_ids_of_the_data_set_are_kept(tmp_path, read):
    write_sample(tmp_path / "a")
    export(DataOptions(dataset="chinese", dataset_root=str(tmp_path / "a")), tmp_path / "b")
    for name in ("test_imgs.tsv", "test_texts.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_images_without_files_are_lossless(tmp_path, read, monkeypatch):
    from clip_retrieval.data.readers import shapes

    monkeypatch.setattr(shapes, "SIZES", {"train": 3, "val": 3, "test": 3})
    export(DataOptions(dataset="shapes", dataset_root=str(tmp_path)), tmp_path / "out", ["test"])
    source, dataset = read("shapes", tmp_path), read("chinese", tmp_path / "out")
    assert dataset.captions == source.captions
    assert all(np.array_equal(dataset.images[i], source.images[i]) for i in range(3))


@pytest.mark.parametrize(
    ("splits", "ids", "words"),
    [
        (["exam"], "number", ["--splits exam", "train, val"]),
        (["test"], "number", ["csv in ", "no test split", "--splits"]),
        ([], "name", ["a/x.jpg", "b/x.jpg", "--ids number"]),
    ],
)
def test_bad_usage(captioned, tmp_path, splits, ids, words):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jpg").write_bytes((captioned / "0.jpg").read_bytes())
    (tmp_path / "x.csv").write_text("image,caption,split\na/x.jpg,one,train\nb/x.jpg,two,train\n")
    with pytest.raises(UserError) as error:
        export(DataOptions(dataset="csv", dataset_root=str(tmp_path)), tmp_path / "out", splits, ids)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)
    assert not list(tmp_path.glob("out/*"))


def test_an_interrupted_export_leaves_no_file(options, tmp_path, monkeypatch):
    def stop(images, index):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "read_image_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        export(options, tmp_path)
    assert names(tmp_path) == []


def test_the_script(captioned, tmp_path):
    script = [sys.executable, ROOT / "scripts" / "export_tsv.py", "--dataset", "csv", "--dataset-root", captioned]
    run = subprocess.run([*script, "--output", tmp_path / "out", "--splits", "test"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == f"{tmp_path}/out/test_imgs.tsv and _texts.jsonl: 6 images, 15 texts\n"
    (tmp_path / "file").write_text("")
    run = subprocess.run([*script, "--output", tmp_path / "file"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "--output" in run.stderr
