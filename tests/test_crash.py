"""A run killed before or after any file write resumes to the same result, and disk faults lose nothing."""

import errno
import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch

from clip_retrieval import files
from tests.conftest import Killed, read_json, read_lines

CLOCKS = ("seconds", "pairs_per_second", "data_percent")


def without_clocks(content):
    """The content of a checkpoint or results.json without measured times; tensors as hashes of their bytes."""
    if isinstance(content, dict):
        return {name: without_clocks(value) for name, value in content.items() if name not in CLOCKS}
    if isinstance(content, (list, tuple)):
        return [without_clocks(value) for value in content]
    if isinstance(content, torch.Tensor):
        flat = content.contiguous().reshape(-1).view(torch.uint8).numpy()
        return content.dtype, content.shape, hashlib.sha256(flat).hexdigest()
    return content


def outputs(folder):
    """All outputs of a run, in every field, except measured times and the name of its folder."""
    content = {}
    for path in sorted(folder.glob("*.pt")):
        content[path.name] = without_clocks(torch.load(path, weights_only=True))
        content[path.name]["options"] |= {"experiments": ""}
    for name in ("results.json", "options.json"):
        content[name] = without_clocks(read_json(folder / name)) | {"experiments": ""}
    content["metrics.jsonl"] = [without_clocks(line) for line in read_lines(folder / "metrics.jsonl")]
    return content


@pytest.fixture
def command(arguments):
    return [*arguments, "--augment", "crop", "--max_steps", "4", "--keep_every", "1", "--keep_steps", "4"]


@pytest.fixture
def whole(run, command, tmp_path):
    """The outputs of an undisturbed run."""
    code, _, err = run(*command, "--resume", "auto", "--experiments", "whole")
    assert code == 0, err
    return outputs(tmp_path / "logs" / "whole")


def replaced_files(run, command, monkeypatch, fail_at=None, before=True, error=None):
    """Run `command`, failing at rename number `fail_at`; return the names of the renamed files and the result."""
    names = []
    normal = os.replace

    def replace(source, target, **options):
        names.append(Path(target).name)
        at = len(names) - 1 == fail_at
        if at and before:
            raise error or Killed
        normal(source, target, **options)
        if at:
            raise error or Killed

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", replace)
        if fail_at is None or error is not None:
            return names, run(*command)
        with pytest.raises(Killed):
            run(*command)
    return names, None


@pytest.mark.slow
def test_kill_between_any_two_writes_loses_nothing(run, command, tmp_path, whole, monkeypatch):
    command = [*command, "--resume", "auto"]
    names, (code, _, err) = replaced_files(run, command, monkeypatch)
    assert code == 0, err
    other_files = {"results.json", "options.json", "metrics.jsonl", "ranks.npz"}
    assert set(names) == {"last.pt", "best.pt", "epoch_1.pt", "step_4.pt", *other_files}
    # "After one write" equals "before the next", except for the last.
    for number, before in [*((number, True) for number in range(len(names))), (len(names) - 1, False)]:
        shutil.rmtree(tmp_path / "logs" / "ex0")
        replaced_files(run, command, monkeypatch, number, before)
        code, _, err = run(*command)
        assert code == 0 and "chosen again" not in err, (names[number], before, err)
        assert outputs(tmp_path / "logs" / "ex0") == whole, (names[number], before)


def test_resume_after_the_last_step_loses_nothing(run, command, tmp_path, whole):
    folder = tmp_path / "logs" / "ex0"
    assert run(*command, "--resume", "auto")[0] == 0
    (folder / "results.json").unlink()
    assert run(*command, "--resume", "auto")[0] == 0
    assert outputs(folder) == whole
    rates = {group["lr"] for group in torch.load(folder / "last.pt", weights_only=True)["optimizer"]["param_groups"]}
    assert rates != {1e-3} and read_json(folder / "results.json")["weights"] == "none"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS, errno.ESTALE])
@pytest.mark.parametrize("name", ["options.json", "metrics.jsonl", "last.pt", "best.pt", "epoch_1.pt", "results.json"])
def test_disk_fault_is_exit_code_3_and_one_line(run, arguments, tmp_path, monkeypatch, number, name):
    command = [*arguments, "--keep_every", "1", "--no_eval_first", "--max_steps", "3"]
    normal = os.replace

    def replace(source, target, **options):
        if Path(target).name == name:
            raise OSError(number, os.strerror(number), str(source))
        normal(source, target, **options)

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", replace)
        code, _, err = run(*command)
    assert code == 3 and err.count("\n") == 1 and str(tmp_path / "logs/ex0" / name) in err, err
    assert not list((tmp_path / "logs/ex0").glob(".*"))
    code, _, err = run(*command, "--resume", "auto")
    assert code == 0, err


class FailingFile:
    """A file whose disk fails at each write."""

    def __init__(self, file, number):
        self._file, self._number = file, number

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, _):
        raise OSError(self._number, os.strerror(self._number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("part", ["log.txt", "metrics.jsonl", "tensorboard"])
def test_disk_fault_in_a_log_is_exit_code_3_and_one_line(run, arguments, tmp_path, monkeypatch, number, part):
    from clip_retrieval.log import log
    from clip_retrieval.reporting.metrics_log import MetricsLog

    normal = MetricsLog.write

    def write(self, kind, step, values):
        if step == 2 and part == "log.txt":
            (handler,) = (h for h in log.handlers if getattr(h, "path", None))
            handler.stream = FailingFile(handler.stream, number)
        elif step == 2 and part == "metrics.jsonl":
            self._file = FailingFile(self._file, number)
        elif step == 2:
            (events,) = self._trackers
            events._records._writer = FailingFile(events._file, number)
        normal(self, kind, step, values)

    monkeypatch.setattr(MetricsLog, "write", write)
    code, _, err = run(*arguments, "--no_eval_first")
    assert code == 3 and err.count("\n") == 1 and part in err and "Traceback" not in err, err


def test_folder_deleted_during_a_run_is_reported(run, arguments, tmp_path, monkeypatch):
    from clip_retrieval.training.trainer import Trainer

    normal = Trainer.step

    def step(self, batch, at, rate):
        if at == 2:
            shutil.rmtree(tmp_path / "logs")
        return normal(self, batch, at, rate)

    monkeypatch.setattr(Trainer, "step", step)
    code, _, err = run(*arguments, "--no_eval_first")
    assert code == 3 and err.count("\n") == 1 and "was deleted" in err and str(tmp_path / "logs/ex0") in err


def test_folder_deleted_during_a_save_is_reported(run, arguments, tmp_path, monkeypatch):
    """Another program has deleted the half-written checkpoint, but not the lock."""
    normal = os.fsync

    def fsync(descriptor):
        for half_written in (tmp_path / "logs/ex0").glob(".last.pt.*.tmp"):
            half_written.unlink()
        normal(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    code, _, err = run(*arguments, "--no_eval_first")
    assert code == 3 and err.count("\n") == 1 and "was deleted" in err and str(tmp_path / "logs/ex0") in err


@pytest.mark.parametrize(
    "damage", [b"{not json}\n", b"\xff\xfe\n", b"[1]\n", b'{"kind": "train"}\n', b'"x"\n', b"[" * 100000 + b"\n", b"\n"]
)
def test_damaged_metrics_line_is_skipped_on_resume(run, run_killed, arguments, tmp_path, damage):
    run_killed(5, *arguments, "--save_every", "2", "--no_eval_first")
    path = tmp_path / "logs/ex0/metrics.jsonl"
    first, *rest = path.read_bytes().splitlines(True)
    path.write_bytes(first + damage + b"".join(rest))
    code, _, err = run(*arguments, "--save_every", "2", "--no_eval_first", "--resume", "auto")
    assert code == 0 and "damaged" in err and err.count("\n") == 1, err
    steps = [line["step"] for line in read_lines(path) if line["kind"] == "train"]
    assert steps == list(range(1, 7))


def test_kill_while_metrics_are_rewritten_keeps_the_history(run, run_killed, arguments, tmp_path, monkeypatch):
    run_killed(5, *arguments, "--save_every", "2", "--no_eval_first")
    before = (tmp_path / "logs/ex0/metrics.jsonl").read_bytes()
    replaced_files(run, [*arguments, "--save_every", "2", "--no_eval_first", "--resume", "auto"], monkeypatch, 1)
    assert (tmp_path / "logs/ex0/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", [("thing,train", "other,train"), ("\n0.jpg", "\n1.jpg")], ids=["caption", "image"])
def test_resume_with_other_captions_or_images_is_refused(run, arguments, captioned, tmp_path, change):
    from clip_retrieval.data.readers import csv_file

    table = tmp_path / "table.csv"
    text = (captioned / "captions.csv").read_text()
    table.write_text(text)
    if change[1].startswith("\n1"):  # two images swap their captions
        text = text.replace("\n0.jpg", "\nX.jpg").replace("\n1.jpg", "\n0.jpg").replace("\nX.jpg", "\n1.jpg")
    else:
        text = text.replace(*change, 1)
    command = [*arguments, "--annotations", table, "--image_dir", captioned]
    assert run(*command, "--epochs", "1")[0] == 0
    table.write_text(text)
    csv_file._read_rows.cache_clear()  # as in a new process
    code, _, err = run(*command, "--resume", "auto")
    assert code == 2 and "other data" in err


def test_resume_with_images_in_another_folder(run, arguments, captioned, tmp_path):
    assert run(*arguments, "--epochs", "1")[0] == 0
    shutil.copytree(captioned, tmp_path / "moved")
    code, _, err = run(*arguments, "--dataset_root", tmp_path / "moved", "--resume", "auto")
    assert code == 0, err


def test_collapse_is_warned_about_once(run, arguments, monkeypatch):
    from clip_retrieval.models.towers import RetrievalModel

    normal = RetrievalModel.forward

    def forward(self, *inputs):
        images, texts = normal(self, *inputs)
        collapsed = [torch.ones_like(features) / features.shape[1] ** 0.5 for features in (images, texts)]
        return collapsed[0] + 0 * images, collapsed[1]

    monkeypatch.setattr(RetrievalModel, "forward", forward)
    code, _, err = run(*arguments, "--epochs", "4", "--no_eval_first")
    assert code == 0 and err.count("collapsed") == 1 and "2.3026" in err
    monkeypatch.setattr(RetrievalModel, "forward", normal)
    code, _, err = run(*arguments, "--epochs", "4", "--no_eval_first", "--overwrite")
    assert code == 0 and "collapsed" not in err
