"""Finetuning on shards from a web server, from the command line: as on local shards, through faults and kills."""

import gzip
import json

import pytest

from clip_retrieval.data.shards import remote
from clip_retrieval.training.trainer import Trainer
from tests.data.make_shards import shards_of_csv
from tests.data.shard_server import ShardServer
from tests.test_bad_input import is_one_line
from tests.test_resume import assert_same_ending

TRAIN, VAL = "train-{000..002}.tar", "val-{000..001}.tar"


@pytest.fixture
def shards(captioned, tmp_path):
    return shards_of_csv(captioned / "captions.csv", tmp_path / "shards")


@pytest.fixture
def server(shards, monkeypatch):
    """A server of `shards` that fails in every third request."""
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    server = ShardServer(shards)
    server.faults = [None, None, "drop", None, "500", None, None, "reset"] * 20
    yield server
    server.close()


@pytest.fixture
def command(arguments):
    """Arguments of a small finetune without its data: 6 steps."""
    settings = arguments[arguments.index("--vision_model") :]
    return [*settings, "--batch_size", "4", "--augment", "crop", "--shuffle_buffer", "8"]


def on(place):
    return ["--train_data", f"{place}/{TRAIN}", "--val_data", f"{place}/{VAL}"]


def with_sizes(shards):
    (shards / "sizes.json").write_text(json.dumps({f"train-00{i}.tar": n for i, n in enumerate((5, 5, 4))}))
    return []


def with_samples(shards):
    return ["--train_num_samples", "14"]


@pytest.mark.parametrize("give", [with_sizes, with_samples])
@pytest.mark.parametrize("ranges", [True, False])
def test_killed_run_on_a_server_equals_a_local_one(run, run_killed, command, server, shards, tmp_path, give, ranges):
    command += give(shards)
    code, _, err = run(*command, *on(shards), "--experiments", "whole")
    assert code == 0, err
    server.ranges = ranges
    command += [*on(server.url), "--save_every", "1", "--resume", "auto"]
    for killed_in_step in (3, 6):
        run_killed(killed_in_step, *command)
    code, out, err = run(*command)
    assert code == 0 and "step 5" in out and "webdataset val: 6 images" in out, err
    assert_same_ending(tmp_path / "logs/whole", tmp_path / "logs/ex0")


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_dead_server_ends_with_exit_code_3_and_the_run_resumes(
    run, command, server, shards, tmp_path, monkeypatch, num_workers
):
    command += [*with_samples(shards), *on(server.url), "--num_workers", num_workers, "--save_every", "1"]
    code, _, err = run(*command, "--experiments", "whole")
    assert code == 0, err
    normal = Trainer.step

    def step(self, batch, at, rate):  # the second epoch begins with step 3
        server.down = server.down or at == 2
        return normal(self, batch, at, rate)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", step)
        code, out, err = run(*command)
    assert code == 3 and is_one_line(err) and "step 2" in out and "step 4" not in out, (err, out)
    assert ".tar: the server failed 6 times in a row" in err and "--resume auto continues the run" in err
    server.down = False
    code, _, err = run(*command, "--resume", "auto")
    assert code == 0, err
    assert_same_ending(tmp_path / "logs/whole", tmp_path / "logs/ex0")


def test_unknown_number_of_samples_is_one_line_without_a_scan(run, command, server):
    code, _, err = run(*command, *on(server.url))
    assert code == 2 and is_one_line(err), err
    assert "train-000.tar: the number of its samples is unknown; give --train_num_samples, or list" in err
    assert f"{server.url}/sizes.json" in err and [path for path, _ in server.requests] == ["/sizes.json"]


@pytest.mark.parametrize(
    "data, words",
    [
        ("https://host/*.tar", "web servers do not list files"),
        ("pipe:curl https://host/0.tar", "runs a program"),
        ("s3://bucket/0.tar", "pip install no_such_package"),
    ],
)
def test_bad_address_is_one_line(run, command, monkeypatch, data, words):
    monkeypatch.setitem(remote.STORES, "s3", "no_such_package")
    code, _, err = run(*command, "--train_data", data)
    assert code == 2 and is_one_line(err) and words in err, err


def test_missing_remote_shard_is_named(run, command, server, shards):
    code, _, err = run(*command, *with_samples(shards), "--train_data", f"{server.url}/train-{{007..008}}.tar")
    assert code == 2 and is_one_line(err) and "train-007.tar: refused by the server (HTTP 404)" in err, err


def test_resume_by_another_command_keeps_the_address(run, command, server, shards, tmp_path):
    code, _, err = run(*command, *with_samples(shards), *on(server.url), "--max_steps", "2")
    assert code == 0, err
    code, out, err = run("--eval", "--resume", tmp_path / "logs/ex0/last.pt", "--eval_split", "val", "--device", "cpu")
    assert code == 0 and "webdataset val: 6 images" in out, err


def test_compressed_local_shards_equal_plain_ones(run, command, shards, tmp_path):
    code, _, err = run(*command, *on(shards), "--experiments", "plain")
    assert code == 0, err
    for path in shards.glob("*.tar"):
        path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    packed = [word.replace(".tar", ".tar.gz") for word in on(shards)]
    code, _, err = run(*command, *packed)
    assert code == 0, err
    assert_same_ending(tmp_path / "logs/plain", tmp_path / "logs/ex0")
