"""The output folder of a run: its lock, and outputs that replace links."""

import errno
import os
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from clip_retrieval.errors import RunError, UserError
from clip_retrieval.run import folder as module
from clip_retrieval.run.folder import LOCK, lock_folder, make_folder
from tests.conftest import ROOT, read_json

HOLD = """
import sys, time
from pathlib import Path
from clip_retrieval.run.folder import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_locked_folder_is_refused_until_the_holder_is_killed(holder, tmp_path):
    with (
        pytest.raises(UserError, match=f"in use by another run .process {holder.pid} on"),
        lock_folder(tmp_path / "run"),
    ):
        pass
    assert (tmp_path / "run" / LOCK).exists()
    holder.kill()
    holder.wait()
    with lock_folder(tmp_path / "run") as lock:
        lock.check()
    assert not (tmp_path / "run" / LOCK).exists()


def test_temporary_files_are_deleted_only_under_the_lock(holder, tmp_path):
    half_written = tmp_path / "run" / ".last.pt.123.tmp"
    half_written.write_bytes(b"half")
    with pytest.raises(UserError), lock_folder(tmp_path / "run"):
        pass
    make_folder(tmp_path / "run")  # as an evaluation does
    assert half_written.exists()
    holder.kill()
    holder.wait()
    with lock_folder(tmp_path / "run"):
        assert not half_written.exists()


def test_forked_child_neither_holds_nor_releases_the_lock(tmp_path):
    code = f"""
import os, sys, time
from pathlib import Path
from clip_retrieval.run.folder import lock_folder
with lock_folder(Path({str(tmp_path / "run")!r})):
    if os.fork() == 0:
        os.closerange(3, 100)  # as an ending child does
        time.sleep(20)  # outlives its killed parent
        os._exit(0)
    time.sleep(1)
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="in use"), lock_folder(tmp_path / "run"):
            pass
        process.kill()
        process.wait()
        with lock_folder(tmp_path / "run"):
            pass
        os.killpg(process.pid, 9)


def test_deleted_folder_is_reported(tmp_path):
    with ExitStack() as stack:
        lock = stack.enter_context(lock_folder(tmp_path / "run"))
        (tmp_path / "run" / LOCK).unlink()
        (tmp_path / "run").rmdir()
        with pytest.raises(RunError, match="was deleted"):
            lock.check()
        make_folder(tmp_path / "run")  # by another run
        with pytest.raises(RunError, match="was deleted"):
            lock.check()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_gives_one_warning(tmp_path, monkeypatch, caplog, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module.fcntl, "lockf", refuse)
    monkeypatch.setattr(module.log, "propagate", True)
    with lock_folder(tmp_path / "run") as lock:
        lock.check()
    assert [record.message for record in caplog.records if "without locks" in record.message]


@pytest.mark.parametrize("place", ["file/run", "a\0b", "\ud800"])
def test_invalid_folder_is_one_line(run, arguments, tmp_path, place):
    (tmp_path / "file").write_text("")
    code, _, err = run(*arguments[:-1], tmp_path / place if "\0" not in place else place)
    assert code == 2 and err.count("\n") == 1 and "--checkpoint_path" in err


OUTPUTS = ("log.txt", "metrics.jsonl", "options.json", "results.json", "last.pt", "best.pt", ".lock", "epoch_1.pt")


def test_outputs_replace_existing_links(run, arguments, tmp_path):
    folder, outside = tmp_path / "logs" / "ex0", tmp_path / "outside"
    folder.mkdir(parents=True)
    outside.mkdir()
    for name in OUTPUTS:
        if name not in ("last.pt", "best.pt"):  # these two make a run
            (outside / name).write_text("precious")
            (folder / name).symlink_to(outside / name)
    (folder / "best.pt").symlink_to(outside / "best.pt")
    (folder / "tensorboard").symlink_to(outside)
    code, _, err = run(*arguments, "--keep_every", "1")
    assert code == 0, err
    assert {path.name for path in outside.iterdir()} == set(OUTPUTS) - {"last.pt", "best.pt"}
    assert {path.read_text() for path in outside.iterdir()} == {"precious"}
    assert not any(path.is_symlink() for path in folder.iterdir()) and (folder / "log.txt").stat().st_size > 100
    assert read_json(folder / "results.json")["steps"] == 6


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl", "options.json"])
def test_fifo_in_place_of_an_output_is_replaced(run, arguments, tmp_path, name):
    folder = tmp_path / "logs" / "ex0"
    folder.mkdir(parents=True)
    os.mkfifo(folder / name)
    code, _, err = run(*arguments, "--max_steps", "1", "--no_eval_first")
    assert code == 0, err
    assert (folder / name).is_file()


@pytest.mark.slow
def test_second_run_is_refused_and_the_first_continues(run, start, arguments, tmp_path):
    folder = tmp_path / "logs" / "ex0"
    first = start(*arguments, "--epochs", "1000", "--eval_every", "0", "--no_eval_first", "--save_every", "1")
    end = time.time() + 120
    while not (folder / "last.pt").exists() and time.time() < end:
        time.sleep(0.05)
    for extra in ((), ("--resume", "auto"), ("--overwrite",)):
        code, _, err = run(*arguments, *extra)
        assert code == 2 and "in use by another run" in err and err.count("\n") == 1
    assert first.poll() is None
    first.terminate()
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130, err
    code, _, err = run(*arguments, "--resume", "auto", "--epochs", "1000", "--max_steps", "1")
    assert code == 0, err


def test_run_that_did_not_start_leaves_no_folder(tmp_path):
    with pytest.raises(UserError), lock_folder(tmp_path / "logs" / "new"):
        raise UserError("no such data")
    assert not (tmp_path / "logs" / "new").exists()
    (tmp_path / "old").mkdir()
    with lock_folder(tmp_path / "old"):
        pass
    assert (tmp_path / "old").is_dir()
    with lock_folder(tmp_path / "used"):
        (tmp_path / "used" / "log.txt").write_text("line")
    assert (tmp_path / "used" / "log.txt").is_file()
