"""scripts/export_shards.py: any data set as tar shards; reading them returns the same data."""

import json

import numpy as np
import pytest
from PIL import Image

from clip_retrieval.data.shards.samples import read_samples
from clip_retrieval.data.writers.tar_shards import export_shards
from clip_retrieval.errors import UserError
from clip_retrieval.options import DataOptions


@pytest.fixture
def options(captioned):
    return DataOptions(dataset="csv", dataset_root=str(captioned))


def sizes(folder):
    return json.loads((folder / "sizes.json").read_text())


def test_shards_are_read_back_unchanged(options, captioned, tmp_path, read):
    export_shards(options, tmp_path, shard_size=6)
    assert sizes(tmp_path) == {
        "train-00000.tar": 6,
        "train-00001.tar": 6,
        "train-00002.tar": 2,
        "valid-00000.tar": 6,
        "test-00000.tar": 6,
    }
    assert {path.name for path in tmp_path.iterdir()} == {*sizes(tmp_path), "sizes.json"}
    for split in ("train", "val", "test"):
        source, dataset = read("csv", captioned, split), read("webdataset", tmp_path, split)
        assert dataset.captions == source.captions and np.array_equal(dataset.pairs, source.pairs)
        for i in range(len(source.images)):
            assert dataset.images.encoded(i) == source.images.encoded(i)


def test_other_formats_become_png_and_one_caption_a_txt(tmp_path, read):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    rows = ["image,caption"]
    for name in ("a.bmp", "b.webp", "c.png", "d.jpeg"):
        Image.fromarray(pixels).save(tmp_path / name)
        rows.append(f"{name},picture {name[0]}")
    (tmp_path / "photos.csv").write_text("\n".join(rows))
    export_shards(DataOptions(dataset="csv", dataset_root=str(tmp_path)), tmp_path / "out")
    assert sizes(tmp_path / "out") == {"train-00000.tar": 4}, "a data set without splits"
    samples = list(read_samples(tmp_path / "out/train-00000.tar"))
    assert [sorted(set(s) - {"__key__", "__url__"}) for s in samples] == [
        ["png", "txt"],
        ["txt", "webp"],
        ["png", "txt"],
        ["jpg", "txt"],
    ]
    dataset = read("webdataset", tmp_path / "out", "train")
    assert dataset.captions == ["picture a", "picture b", "picture c", "picture d"]
    assert np.array_equal(np.asarray(dataset.images[0]), pixels)


def test_existing_shards_are_not_mixed_with_new_ones(options, tmp_path):
    export_shards(options, tmp_path, ["test"])
    export_shards(options, tmp_path, ["val"])
    assert sizes(tmp_path) == {"test-00000.tar": 6, "val-00000.tar": 6}
    with pytest.raises(UserError, match=r"test-00000\.tar already"):
        export_shards(options, tmp_path, ["test"], shard_size=3)


def test_an_invalid_sizes_json_is_refused_before_writing(script, captioned, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "sizes.json").write_text("[1]")
    code, _, err = script("export_shards", "--dataset", "csv", "--dataset_root", captioned, "--output", output)
    assert code == 2 and len(err.strip().splitlines()) == 1 and f"{output / 'sizes.json'}: not a table" in err
    assert [path.name for path in output.iterdir()] == ["sizes.json"]


def test_the_script(script, captioned, tmp_path):
    data = ("--dataset", "csv", "--dataset_root", captioned, "--output", tmp_path / "out")
    code, out, err = script("export_shards", *data, "--splits", "val,test", "--shard_size", "4")
    assert code == 0, err
    assert "2 shards, 6 images" in out
    assert sizes(tmp_path / "out") == {
        "val-00000.tar": 4,
        "val-00001.tar": 2,
        "test-00000.tar": 4,
        "test-00001.tar": 2,
    }
    for extra, word in ((("--splits", "nope"), "nope"), (("--shard_size", "0"), "--shard_size 0")):
        code, _, err = script("export_shards", *data, *extra)
        assert code == 2 and word in err and len(err.strip().splitlines()) == 1
