"""Finetuning on tar shards, from the command line."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from clip_retrieval.data.shards import order
from tests.conftest import read_json, read_lines
from tests.data.make_shards import jpeg, numbered, shards_of_csv, write_shard, write_shards
from tests.test_bad_input import is_one_line
from tests.test_resume import assert_same_ending
from tests.torchrun import MINUTE, Torchrun


@pytest.fixture
def shards(captioned, tmp_path):
    """The images of `captioned` in shards of five: 14 train images in three shards, 6 val and 6 test images."""
    return shards_of_csv(captioned / "captions.csv", tmp_path / "shards")


@pytest.fixture
def settings(arguments):
    """Arguments of a small finetune without its data: two epochs, in batches of 4."""
    return [*arguments[arguments.index("--vision_model") :], "--batch_size", "4"]


@pytest.fixture
def on_shards(settings, shards):
    """Arguments of a small finetune on the shards: 6 steps."""
    return ["--dataset", "webdataset", "--dataset_root", shards, *settings]


def last(tmp_path, name="ex0"):
    return torch.load(tmp_path / "logs" / name / "last.pt", weights_only=True)


def steps_of(tmp_path, name="ex0"):
    return [line["step"] for line in read_lines(tmp_path / "logs" / name / "metrics.jsonl") if line["kind"] == "train"]


def test_run_on_shards_is_scored_on_val_and_test(run, on_shards, tmp_path):
    code, out, err = run(*on_shards)
    assert code == 0, err
    assert "webdataset train: 3 shards, 14 pairs an epoch" in out and "  00000: a " in out
    assert "webdataset val: 6 images, 15 captions" in out and steps_of(tmp_path) == list(range(1, 7))
    results = read_json(tmp_path / "logs/ex0/results.json")
    assert (results["dataset"], results["split"], results["images"]) == ("webdataset", "test", 6)
    assert results["val"]["images"] == 6


def test_patterns_imply_the_dataset_from_any_folder(run, settings, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = ["--train_data", "shards/train-{000..001}.tar shards/train-002.tar", "--val_data", "shards/val-*.tar"]
    code, out, err = run(*settings, *data, "--dataset_root", "nowhere", "--max_steps", "1")
    assert code == 0, err
    assert "webdataset train: 3 shards, 14 pairs" in out and "there is no test split" in err
    monkeypatch.chdir(tmp_path / "logs")
    checkpoint = ["--resume", tmp_path / "logs/ex0/last.pt", "--checkpoint_path", tmp_path / "logs", "--device", "cpu"]
    code, out, err = run(*checkpoint, "--max_steps", "2", "--num_workers", "0")
    assert code == 0, err
    code, out, err = run("--eval", *checkpoint, "--eval_split", "val")
    assert code == 0, err
    assert "webdataset val: 6 images" in out
    code, out, err = run("--eval", *checkpoint)
    assert code == 2 and is_one_line(err) and "has no test split; choose another --eval_split" in err


def test_patterns_in_a_folder_with_blanks_survive_a_checkpoint(run, settings, shards, tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    shards.rename(tmp_path / "a b/s")
    monkeypatch.chdir(tmp_path / "a b")
    data = ["--train_data", "s/train-000.tar s/train-001.tar", "--val_data", "s/val-000.tar s/val-001.tar"]
    code, out, err = run(*settings, *data, "--max_steps", "1")
    assert code == 0 and "train: 2 shards" in out, err
    monkeypatch.chdir(tmp_path)
    code, out, err = run("--eval", "--resume", tmp_path / "logs/ex0/last.pt", "--eval_split", "val", "--device", "cpu")
    assert code == 0 and "webdataset val: 6 images" in out, err


def test_folder_of_tars_or_a_compressed_one_implies_the_dataset(run, settings, shards, tmp_path):
    code, out, err = run(*settings, "--train_data", shards, "--max_steps", "1", "--no_eval_first")
    assert code == 0 and "webdataset train: 7 shards" in out, err
    for name in ("x.tgz", "x.tar.gz"):
        (tmp_path / name).write_bytes(gzip.compress(shards.joinpath("train-000.tar").read_bytes()))
        code, out, err = run(*settings, "--train_data", tmp_path / name, "--max_steps", "1", "--overwrite")
        assert code == 0 and "webdataset train: 1 shard, 5 pairs" in out, err


def test_val_shards_are_not_trained_on(run, settings, tmp_path):
    root = tmp_path / "leak"
    write_shards(root, [6, 6, 6], prefix="0")
    data = ["--dataset", "webdataset", "--dataset_root", root, "--val_data", root / "0-002.tar"]
    code, out, err = run(*settings, *data, "--max_steps", "1")
    assert code == 0 and "webdataset train: 2 shards, 12 pairs" in out and "webdataset val: 6 images" in out, err


def test_yfcc7m_in_the_layout_of_simple_clip(run, settings, tmp_path):
    write_shards(tmp_path / "data/yfcc7m", [6, 6], prefix="0")
    code, out, err = run(*settings, "--dataset", "yfcc7m", "--dataset_root", tmp_path / "data")
    assert code == 0, err
    assert "yfcc7m train: 2 shards, 12 pairs an epoch" in out and "there is no val split" in err


@pytest.fixture
def broken_shards(shards):
    """`shards` with two further samples in the second shard that cannot be used."""
    from clip_retrieval.data.shards.samples import read_samples

    path = shards / "train-001.tar"
    samples = [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in read_samples(path)]
    odd = [("broken", {"jpg": jpeg(0)[:300], "txt": "x"}), ("without", {"jpg": jpeg(1)})]
    write_shard(path, [*samples[:2], *odd, *samples[2:]])
    return shards


def test_skipped_samples_are_logged_if_a_run_ends_within_an_epoch(run, on_shards, broken_shards):
    code, _, err = run(*on_shards, "--max_steps", "3", "--eval_every", "0")  # of 4 per epoch
    assert code == 0 and "epoch 1, batches 1 to 3: 2 samples could not be used" in err
    code, _, err = run(*on_shards, "--max_steps", "8", "--eval_every", "0", "--resume", "auto")
    assert code == 0 and "epoch 2, batches 1 to 4: 2 samples could not be used" in err
    assert "epoch 1, batches 1" not in err


def test_first_shard_without_usable_samples_is_skipped(run, on_shards, shards):
    write_shard(shards / "train-000.tar", [(f"{i}", {"jpg": b"none", "txt": "x"}) for i in range(5)])
    code, out, err = run(*on_shards, "--max_steps", "3")
    assert code == 0 and "  00005: a " in out, err


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("extra", [(), ("--train_num_samples", "14")], ids=["counted", "given"])
def test_resume_after_kill_within_a_shard_is_bit_identical(
    run, run_killed, on_shards, broken_shards, tmp_path, num_workers, extra
):
    command = [*on_shards, "--augment", "crop", "--shuffle_buffer", "8", *extra]
    code, _, err = run(*command, "--experiments", "whole")
    assert code == 0 and "could not be used" in err, err
    command += ["--save_every", "1", "--resume", "auto", "--num_workers", num_workers]
    for killed_in_step in (3, 6):
        run_killed(killed_in_step, *command)
    code, out, err = run(*command)
    assert code == 0 and "step 5" in out, err
    assert_same_ending(tmp_path / "logs/whole", tmp_path / "logs/ex0")


def test_evaluations_within_an_epoch_do_not_change_batches(run, on_shards, tmp_path):
    for name, steps in (("whole", "0"), ("ex0", "1")):
        code, _, err = run(*on_shards, "--augment", "crop", "--eval_steps", steps, "--experiments", name)
        assert code == 0, err
    whole, other = (last(tmp_path, name)["model"] for name in ("whole", "ex0"))
    assert all(torch.equal(whole[name], other[name]) for name in whole)


def test_each_option_changes_the_stream(run, on_shards, tmp_path):
    options = ["", "--augment crop", "--augment auto", "--decoder fast", "--shuffle_buffer 0", "--seed 5"]
    losses = []
    for number, extra in enumerate(options):
        command = [*on_shards, *extra.split(), "--max_steps", "1", "--no_eval_first", "--eval_every", "0"]
        code, _, err = run(*command, "--experiments", f"ex{number}")
        assert code == 0, err
        (line,) = (x for x in read_lines(tmp_path / f"logs/ex{number}/metrics.jsonl") if x["kind"] == "train")
        losses.append(line["loss"])
    assert len(set(losses)) == len(options)


def test_one_caption_per_epoch_is_logged_for_several_captions(run, on_shards, shards):
    command = [*on_shards, "--max_steps", "1", "--no_eval_first", "--eval_every", "0", "--overwrite"]
    message = "shards: one random caption per image and epoch"
    assert message in run(*command)[1] and message not in run(*command, "--caption_sampling", "one")[1]
    for number in range(3):
        write_shard(shards / f"train-{number:03}.tar", numbered(5 * number, 5))
    assert message not in run(*command)[1]


def test_train_num_samples_avoids_counting(run, on_shards, tmp_path, monkeypatch):
    counted = []
    normal = order.count_samples
    monkeypatch.setattr(order, "count_samples", lambda path: counted.append(path) or normal(path))
    monkeypatch.setattr("clip_retrieval.data.shards.train_split.count_samples", lambda path: 1 / 0)
    code, out, err = run(*on_shards, "--train_num_samples", "9", "--max_steps", "1", "--no_eval_first")
    assert code == 0, err
    assert "3 shards, 9 pairs an epoch" in out and "1 step, 2 an epoch" in out and len(counted) < 3


def test_sizes_json_avoids_counting(run, on_shards, shards, monkeypatch):
    (shards / "sizes.json").write_text(json.dumps({"train-000.tar": 5, "train-001.tar": 5, "train-002.tar": 4}))
    monkeypatch.setattr("clip_retrieval.data.shards.train_split.count_samples", lambda path: 1 / 0)
    code, out, err = run(*on_shards)
    assert code == 0 and "14 pairs an epoch" in out, err
    (shards / "sizes.json").write_text(json.dumps({"train-000.tar": 5, "train-001.tar": 5, "train-002.tar": 7}))
    code, _, err = run(*on_shards, "--overwrite", "--batch_size", "17")
    assert code == 2 and is_one_line(err) and "train-002.tar: holds fewer samples than the 7" in err


def test_small_train_split_shrinks_the_batch(run, on_shards):
    code, _, err = run(*on_shards, "--batch_size", "256", "--max_steps", "1")
    assert code == 0 and "the train split has 14 pairs an epoch: --batch_size 256 becomes 14" in err


def test_frozen_tower_is_unchanged_and_the_other_is_trained(run, on_shards, tmp_path):
    code, out, err = run(*on_shards, "--freeze_vision", "--eval_every", "0", "--keep_steps", "1")
    assert code == 0 and "encoded once" not in out, err
    before, after = (
        torch.load(tmp_path / f"logs/ex0/{name}", weights_only=True)["model"] for name in ("step_1.pt", "last.pt")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(name.startswith("visual.") for name in moved)


def test_resume_with_another_order_is_refused(run, on_shards, shards, arguments):
    assert run(*on_shards, "--epochs", "1")[0] == 0
    code, _, err = run(*on_shards, "--resume", "auto", "--shuffle_buffer", "5")
    assert code == 2 and is_one_line(err) and "--shuffle_buffer 4096" in err
    code, _, err = run(*on_shards, "--resume", "auto", "--train_num_samples", "12")
    assert code == 2 and is_one_line(err) and "--train_num_samples" in err and "other data" not in err
    write_shard(shards / "train-003.tar", numbered(50, 3))
    code, _, err = run(*on_shards, "--resume", "auto")
    assert code == 2 and is_one_line(err) and "other data" in err
    code, _, err = run(*arguments, "--batch_size", "4", "--resume", "auto")
    assert code == 2 and is_one_line(err) and "other data" in err
    code, _, err = run(*on_shards, "--resume", "auto", "--reset_data_offset")
    assert code == 0, err


@pytest.mark.parametrize(
    "damage, extra, words",
    [
        (None, ("--train_data", "{}/train-{000..003}.tar"), ["--train_data", "train-003.tar is missing"]),
        (None, ("--train_data", "{}/none-*.tar"), ["--train_data", "no shards in", "none-*.tar"]),
        (None, ("--val_data", "{}/none.tar"), ["--val_data", "none.tar"]),
        (lambda content: content[:3000], (), ["train-001.tar", "its end is missing"]),
        (lambda content: b"no tar" * 2000, (), ["train-001.tar", "not a tar"]),
        (lambda content: content[:512] + b"\xff" * 5120 + content[5632:], (), ["train-001.tar"]),
        (None, ("--caption_key", "alt"), ["train-000.tar, sample 00000", "no 'alt'", "--caption_key"]),
        (None, ("--image_cache", "{}/cache"), ["--image_cache", "webdataset"]),
        (None, ("--train_num_samples", "1"), ["--train_num_samples", "at least 2"]),
        (None, ("--shuffle_buffer", "-1"), ["--shuffle_buffer", "at least 0"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_line_before_training(run, on_shards, shards, damage, extra, words):
    if damage:
        path = shards / "train-001.tar"
        path.write_bytes(damage(path.read_bytes()))
    code, out, err = run(*on_shards, *(value.replace("{}", str(shards)) for value in extra))
    assert code == 2 and is_one_line(err) and "step 1" not in out, err
    assert all(word in err for word in words), err


def test_stream_options_are_refused_for_other_datasets(run, arguments, settings, tmp_path):
    code, _, err = run(*arguments, "--train_num_samples", "9")
    assert code == 2 and is_one_line(err) and "--train_num_samples is only for --dataset webdataset" in err
    code, _, err = run("--dataset", "webdataset", "--dataset_root", tmp_path / "nowhere", *settings)
    assert code == 2 and is_one_line(err) and "nowhere: no such folder" in err


def test_shards_in_a_mixture(run, arguments, shards):
    code, out, err = run(*arguments, "--dataset", "webdataset", "--dataset_root", shards, "--max_steps", "1")
    assert code == 0, err
    assert "csv: 14 images, 35 captions" in out and "webdataset: 14 images, 35 captions" in out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads processes from /proc")
def test_two_processes_equal_one(run, on_shards, broken_shards, tmp_path):
    command = [*on_shards, "--augment", "crop", "--eps", "1", "--lr", "0.1"]
    code, _, err = run(*command, "--experiments", "one")
    assert code == 0 and "2 samples could not be used" in err
    torchrun = Torchrun("main.py", *command, "--experiments", "two", marker=tmp_path)
    try:
        code, out, err = torchrun.end(timeout=2 * MINUTE)
    finally:
        torchrun.kill()
    assert code == 0, err
    assert "of 4 = 2 x 2 pairs" in out and "2 samples could not be used" in err
    one, two = last(tmp_path, "one")["model"], last(tmp_path, "two")["model"]
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-5) for name in one)


def test_caption_prefix_is_that_of_the_shards_captions(run, on_shards, shards, tmp_path):
    from clip_retrieval.data.shards.samples import read_samples

    assert run(*on_shards, "--max_steps", "2", "--caption_prefix", "a photo of ")[0] == 0
    for path in shards.glob("train-*.tar"):
        samples = [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in read_samples(path)]
        typed = [(key, s | {"json": s["json"].replace(b'"a ', b'"a photo of a ')}) for key, s in samples]
        write_shard(path, typed)
    assert run(*on_shards, "--max_steps", "2", "--experiments", "typed")[0] == 0
    found, expected = last(tmp_path)["model"], last(tmp_path, "typed")["model"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
