"""Finetuning on mixtures of datasets and on Hugging Face datasets: reading, training, scoring and resuming."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from clip_retrieval.data.batches.sampler import BatchSampler, process_slice
from clip_retrieval.data.catalog import read_dataset
from clip_retrieval.data.readers import csv_file, shapes
from clip_retrieval.data.writers.tsv import export
from clip_retrieval.options import DataOptions
from tests.conftest import ROOT, read_json
from tests.data.make_shards import jpeg, numbered, write_shard
from tests.test_bad_input import is_one_line
from tests.test_resume import assert_same_ending


@pytest.fixture
def halves(captioned, tmp_path):
    """The small dataset as two: 8 train images with val and test, and the other 6 train images."""
    header, *rows = (captioned / "captions.csv").read_text().splitlines()
    second = [row for row in rows if row.endswith(",train") and int(row.split(".")[0]) >= 8]
    parts = [row for row in rows if row not in second], second
    for number, part in enumerate(parts):
        folder = tmp_path / f"half{number}"
        folder.mkdir()
        (folder / "captions.csv").write_text("\n".join([header, *part]) + "\n")
        for name in {row.split(",")[0] for row in part}:
            shutil.copy(captioned / name, folder)
    return tmp_path / "half0", tmp_path / "half1"


@pytest.fixture
def settings(captioned, tmp_path):
    """Arguments of a small finetune, without its data."""
    return [
        *("--vision_model", captioned / "small.json", "--epochs", "2", "--batch_size", "10", "--lr", "1e-3"),
        *("--warmup", "2", "--display", "1", "--num_workers", "0", "--device", "cpu"),
        *("--checkpoint_path", tmp_path / "logs"),
    ]


@pytest.fixture
def both(halves):
    return [*("--dataset", "csv", "--dataset", "csv", "--dataset_root", halves[0], "--dataset_root", halves[1])]


@pytest.fixture
def drawings(tmp_path, monkeypatch):
    """The root of a small `shapes` dataset."""
    monkeypatch.setattr(shapes, "SIZES", {"train": 12, "val": 2, "test": 2})
    return tmp_path / "drawings"


def weights(folder):
    return torch.load(folder / "last.pt", weights_only=True)["model"]


def assert_same_weights(a, b):
    assert all(torch.equal(weights(a)[name], value) for name, value in weights(b).items())


def test_two_halves_train_to_the_weights_of_the_whole(run, settings, both, captioned, tmp_path):
    code, out, err = run(*settings, *both, "--augment", "crop", "--experiments", "halves")
    assert code == 0, err
    assert "csv+csv train: 14 images, 35 captions" in out and "  csv: 8 images, 20 captions" in out
    assert "val split: from csv, the first data set that has one" in out
    whole = ("--dataset", "csv", "--dataset_root", captioned)
    assert run(*settings, *whole, "--augment", "crop", "--experiments", "whole")[0] == 0
    halves, whole = tmp_path / "logs" / "halves", tmp_path / "logs" / "whole"
    assert_same_ending(halves, whole)
    assert read_json(halves / "results.json")["images"] == 6


def test_dataset_weights_set_the_pairs_of_an_epoch(run, settings, both, tmp_path):
    settings += ["--max_steps", "2", "--no_eval_first"]
    code, out, err = run(*settings, *both, "--dataset_weights", "1", "4", "--experiments", "weighted")
    assert code == 0, err
    assert "an epoch's 35 pairs: 7 of csv, 28 of csv" in out
    assert run(*settings, *both, "--dataset_weights", "2", "8", "--experiments", "same")[0] == 0
    assert run(*settings, *both, "--experiments", "plain")[0] == 0
    logs = tmp_path / "logs"
    assert_same_weights(logs / "weighted", logs / "same")
    assert any(
        not torch.equal(weights(logs / "weighted")[name], value) for name, value in weights(logs / "plain").items()
    )


@pytest.mark.parametrize("sampling", ["all", "one"])
def test_resume_of_a_weighted_mixture_is_bit_identical(run, run_killed, settings, both, tmp_path, sampling):
    command = [*settings, *both, "--dataset_weights", "1", "3", "--caption_sampling", sampling, "--batch_size", "7"]
    command += ["--augment", "crop", "--save_every", "1", "--resume", "auto"]
    assert run(*command, "--experiments", "whole")[0] == 0
    run_killed(3, *command)
    code, _, err = run(*command)
    assert code == 0, err
    assert_same_ending(tmp_path / "logs" / "whole", tmp_path / "logs" / "ex0")


def test_resume_with_other_weights_or_data_is_refused(run, settings, both, halves, tmp_path):
    assert run(*settings, *both, "--dataset_weights", "1", "3", "--max_steps", "2")[0] == 0
    resumed = [*settings, *both, "--resume", "auto", "--max_steps", "4"]
    code, _, err = run(*resumed, "--dataset_weights", "1", "2")
    assert code == 2 and is_one_line(err) and "--dataset_weights 1.0 3.0" in err
    turned = ["--dataset_root", halves[1], "--dataset_root", halves[0]]
    code, _, err = run(
        *settings, *both[:4], *turned, "--resume", "auto", "--dataset_weights", "1", "3", "--max_steps", "4"
    )
    assert code == 2 and is_one_line(err) and "other data" in err
    assert run(*resumed)[0] == 0, "without --dataset_weights, those of the checkpoint are used"


def test_checkpoint_finds_its_datasets_from_any_folder(run, settings, halves, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = ("--dataset", "csv", "--dataset", "csv", "--dataset_root", "half0", "--dataset_root", "half1")
    assert run(*settings, *relative, "--dataset_weights", "1", "3", "--max_steps", "2")[0] == 0
    folder = tmp_path / "logs" / "ex0"
    assert read_json(folder / "options.json")["dataset"] == ["csv", "csv"]
    stored = torch.load(folder / "last.pt", weights_only=True)["options"]
    assert stored["dataset"] == ("csv", "csv") and stored["dataset_root"] == tuple(map(str, halves))
    monkeypatch.chdir("/")
    code, _, err = run("--eval", "--resume", folder / "best.pt", "--device", "cpu", "--num_workers", "0")
    assert code == 0, err
    scored = read_json(folder / "eval_csv+csv_test" / "results.json")
    assert scored["rsum"] == pytest.approx(read_json(folder / "results.json")["rsum"]) and scored["dataset"] == "csv"
    code, _, err = run(*settings, "--resume", "auto", "--max_steps", "4")
    assert code == 0, err
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 4


def test_mixture_model_is_scored_on_one_dataset_and_resumes_moved_data(
    run, settings, both, halves, captioned, tmp_path
):
    assert run(*settings, *both, "--dataset_weights", "1", "3", "--max_steps", "2")[0] == 0
    folder = tmp_path / "logs" / "ex0"
    other = ("--dataset", "csv", "--dataset_root", captioned, "--eval_split", "val")
    code, _, err = run("--eval", "--resume", folder / "last.pt", *other, "--device", "cpu", "--num_workers", "0")
    assert code == 0, err
    assert read_json(folder / "eval_csv_val" / "results.json")["images"] == 6
    for number, half in enumerate(halves):
        shutil.move(half, tmp_path / f"moved{number}")
    moved = ("--dataset_root", tmp_path / "moved0", "--dataset_root", tmp_path / "moved1")
    code, _, err = run("--resume", folder / "last.pt", *moved, "--max_steps", "3", *settings[-2:])
    assert code == 0, err
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 3


def test_options_json_of_a_mixture_is_a_config(run, settings, both, tmp_path):
    assert run(*settings, *both, "--dataset_weights", "1", "3", "--max_steps", "2", "--experiments", "first")[0] == 0
    config = tmp_path / "logs" / "first" / "options.json"
    code, _, err = run("--config", config, "--checkpoint_path", tmp_path / "logs", "--experiments", "second")
    assert code == 0, err
    assert_same_weights(tmp_path / "logs" / "first", tmp_path / "logs" / "second")


def test_image_cache_is_per_dataset_and_does_not_change_results(run, settings, both, drawings, tmp_path):
    mixture = (*both, "--dataset", "shapes", "--dataset_root", drawings, "--max_steps", "3")
    cache = ("--image_cache", tmp_path / "cache")
    assert run(*settings, *mixture, "--experiments", "plain")[0] == 0
    code, _, err = run(*settings, *mixture, *cache, "--experiments", "cached")
    assert code == 0, err
    assert_same_ending(tmp_path / "logs" / "plain", tmp_path / "logs" / "cached")
    assert len(list((tmp_path / "cache").glob("csv_train_*.pixels"))) == 2  # shapes are in memory
    code, out, _ = run(*settings, *both[:2], *both[4:6], *cache, "--max_steps", "1", "--experiments", "alone")
    assert code == 0 and "building" not in out, "alone, a dataset reads the cache of the mixture"


def test_loader_processes_read_a_mixture(run, settings, both, tmp_path):
    for name, workers in (("none", "0"), ("two", "2")):
        assert run(*settings, *both, "--max_steps", "2", "--num_workers", workers, "--experiments", name)[0] == 0
    assert_same_ending(tmp_path / "logs" / "none", tmp_path / "logs" / "two")


def test_broken_image_in_a_shard_is_skipped_and_counted(run, settings, halves, tmp_path):
    write_shard(tmp_path / "s/train-0.tar", [*numbered(0, 9), ("broken", {"jpg": jpeg(9)[:300], "txt": "x"})])
    mixture = ("--dataset", "csv", "--dataset", "webdataset", "--dataset_root", halves[0], "--dataset_root")
    code, _, err = run(*settings, *mixture, tmp_path / "s", "--no_eval_first")
    assert code == 0, err
    warnings = [line for line in err.splitlines() if "could not be used" in line]
    assert len(warnings) == 2  # one per epoch, which drops none of the 30 pairs
    for line in warnings:
        assert "1 image could not be used, replaced by others" in line and "train-0.tar, broken.jpg" in line
    # An unreadable image file stops the run instead.
    (halves[0] / "0.jpg").write_bytes(b"no image")
    code, _, err = run(*settings, "--dataset", "csv", "--dataset_root", halves[0], "--experiments", "own")
    assert code == 2 and "0.jpg: not a readable image" in err


def test_each_process_gets_its_slice_of_the_same_batches(halves):
    def sampler():
        options = DataOptions(dataset=("csv", "csv"), dataset_root=tuple(map(str, halves)))
        return BatchSampler(read_dataset(options, "train"), 8, weights=(1, 3))

    alone = list(sampler().epoch(0))
    for rank in range(2):
        share = process_slice(8, rank, 2)
        for batch, other in zip(sampler().epoch(0), alone, strict=True):
            assert (batch.captions[share] == other.captions[share]).all()


def test_mixture_is_exported_with_the_bytes_of_its_files(halves, drawings, tmp_path):
    options = DataOptions(dataset=("csv", "shapes"), dataset_root=(str(halves[1]), str(drawings)))
    export(options, tmp_path / "out", ["train"])
    source = read_dataset(options, "train")
    found = read_dataset(DataOptions(dataset="chinese", dataset_root=str(tmp_path / "out")), "train")
    assert found.captions == source.captions and np.array_equal(found.pairs, source.pairs)
    assert found.images.encoded(0) == (halves[1] / "8.jpg").read_bytes()
    assert np.array_equal(np.asarray(found.images[10]), np.asarray(source.images[10]))


def test_saved_dataset_trains_to_the_weights_of_its_files(run, settings, captioned, tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = {}
    for row in csv_file._read_rows(captioned / "captions.csv", "image", "caption", "split", None)[0]:
        splits.setdefault(row.split, []).append({"image": str(captioned / row.image), "caption": row.caption})
    saved = {
        name: datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()) for name, rows in splits.items()
    }
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "saved"))
    for name, root, workers in (("csv", captioned, "0"), ("huggingface", tmp_path / "saved", "2")):
        data = ("--dataset", name, "--dataset_root", root, "--num_workers", workers, "--experiments", name)
        code, _, err = run(*settings, *data)
        assert code == 0, err
    assert_same_ending(tmp_path / "logs" / "csv", tmp_path / "logs" / "huggingface")


@pytest.mark.parametrize(
    "typed, words",
    [
        (
            "--dataset csv --dataset csv --dataset csv --dataset_root A --dataset_root B",
            ["--dataset_root", "2 times", "3"],
        ),
        ("--dataset csv --dataset csv --dataset_root A --dataset_root T", ["csv in T", "no train split"]),
        ("--dataset csv --dataset csw --dataset_root A", ["--dataset csw", "csv"]),
        (
            "--dataset csv --dataset csv --dataset_root A --dataset_root B --dataset_weights 1",
            ["--dataset_weights", "2"],
        ),
        (
            "--dataset csv --dataset csv --dataset_root A --dataset_root B --dataset_weights 1 0",
            ["--dataset_weights 0"],
        ),
        ("--dataset csv --dataset huggingface --dataset_root A --dataset_root B", ["B", "dataset_dict.json"]),
    ],
)
def test_bad_input_is_one_line(run, settings, halves, captioned, tmp_path, typed, words):
    places = {"A": str(halves[0]), "B": str(halves[1]), "T": str(tmp_path / "only_test")}
    (tmp_path / "only_test").mkdir()
    (tmp_path / "only_test" / "captions.csv").write_text("image,caption,split\n0.jpg,a dog,test\n")
    shutil.copy(captioned / "0.jpg", tmp_path / "only_test")
    code, _, err = run(*settings, *(places.get(word, word) for word in typed.split()))
    assert code == 2 and is_one_line(err), err
    for word in words:
        assert places.get(word, word.replace(" T", f" {places['T']}")) in err, err


HUB = """
import base64, pathlib
import datasets

PHOTOS = pathlib.Path({photos!r})


def load_dataset(name, *config, split=None, trust_remote_code=None):
    if name == "vicenteor/sbu_captions":
        links = [f"file://{{PHOTOS}}/{{number}}.jpg" for number in (3, 4, 5, "gone")]
        return datasets.Dataset.from_dict(
            {{"image_url": links, "user_id": ["x"] * 4, "caption": [f"a thing {{number}}" for number in range(4)]}}
        )
    assert name == "MMInstruction/M3IT" and config in (("coco",), ("textcap",))
    images = [[base64.b64encode((PHOTOS / f"{{number}}.jpg").read_bytes()).decode()] for number in (0, 1, 0)]
    columns = {{"instruction": ["x"] * 3, "inputs": [""] * 3, "image_base64_str": images, "outputs": list("abc")}}
    return datasets.DatasetDict(train=datasets.Dataset.from_dict(columns))


datasets.load_dataset = load_dataset
"""


@pytest.mark.slow
def test_recipes_fetch_and_train_on_combined(captioned, tmp_path):
    """With a local replacement of the hub, which has three rows of M3IT and four of SBU."""
    # the local hub
    pytest.importorskip("datasets")
    photos = tmp_path / "photos"
    shutil.copytree(captioned, photos)
    Image.new("RGB", (600, 300)).save(photos / "5.jpg")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "sitecustomize.py").write_text(HUB.format(photos=str(photos)))
    environment = os.environ | {"PYTHON": sys.executable, "HF_HOME": str(tmp_path / "cache")}

    def recipe(name, *arguments, **extra):
        command = ["bash", str(ROOT / "scripts" / name), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment | extra, capture_output=True, text=True)

    # fetch and read
    result = recipe("get_simple_clip_data.sh", tmp_path / "DATA", PYTHONPATH=str(tmp_path / "hub"))
    assert result.returncode == 0, result.stderr
    train = read_dataset(DataOptions(dataset="combined", dataset_root=str(tmp_path / "DATA")), "train")
    assert [(len(part.images), len(part.captions)) for part in train.parts] == [(2, 3), (2, 3), (3, 3)]
    assert (train.captions[:3], train.captions[6:]) == (["a", "b", "c"], ["a thing 0", "a thing 1", "a thing 2"])
    assert train.images[4].size == (24, 20) and train.images[6].size == (512, 256)

    # train
    short = ["--vision_model", captioned / "small.json", "--pretrained", "none", "--text_pretrained", "none"]
    short += ["--image_size", "16", "--precision", "fp32", "--max_steps", "2", "--batch_size", "4", "--device", "cpu"]
    result = recipe("combined_from_scratch_simple_clip.sh", tmp_path / "DATA", *short)
    assert result.returncode == 0, result.stderr
    options = read_json(tmp_path / "logs" / "combined_from_scratch_simple_clip" / "options.json")
    assert (options["dataset"], options["caption_sampling"], options["lr"]) == ("combined", "one", 1e-4)
    assert recipe("get_simple_clip_data.sh", tmp_path / "DATA", "imagenet").returncode == 2
