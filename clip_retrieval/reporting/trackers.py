"""Trackers, which show the metrics of runs: TensorBoard, Weights & Biases and Trackio."""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from clip_retrieval.errors import UserError, describe
from clip_retrieval.files import named_errors, read_text, remove_special, write_text
from clip_retrieval.log import log

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = "clip_retrieval"
SHOWN_METRICS = ("train/loss", "val/rsum", "test/rsum")
"""Metrics beside the hyper-parameters in TensorBoard."""
RUN_ID = "wandb_id.txt"


class Tracker(Protocol):
    """Receives the scalars of a run."""

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Write scalars, a dict from tag to value."""
        ...

    def close(self) -> None: ...


def parse_trackers(report_to: str) -> list[str]:
    """Return the trackers that --report_to names, separated by commas; none for "none".

    Raises UserError if a name is unknown or its package is not installed.
    """
    names = list(dict.fromkeys(name.strip() for name in report_to.split(",")))
    if names == ["none"]:
        return []
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--report_to {name}: choose from {', '.join(TRACKERS)} (separated by commas), or none")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name}: is not installed; install it with: pip install {name}")
    return names


def open_tracker(name: str, folder: Path, options: Mapping[str, Any], first_step: int | None) -> Tracker:
    """Start or resume a run in a tracker.

    Args:
        name: one of TRACKERS.
        folder: the folder of the run.
        options: all options, which the tracker shows.
        first_step: for a resumed run, the first step that it writes.

    Raises UserError if the tracker refuses the run, for example without a login.
    """
    if name == "tensorboard":
        return EventFile(folder / "tensorboard", options, purge_step=first_step)
    return ServiceRun(name, folder, options, resumes=first_step is not None)


class ServiceRun:
    """A run of wandb, or of trackio, which has the same interface. A fault of the service does not end the run."""

    def __init__(self, name: str, folder: Path, options: Mapping[str, Any], *, resumes: bool):
        self._name, self._works = name, True
        settings: dict[str, Any] = {"project": PROJECT, "name": _printable(folder.resolve().name)}
        settings["config"] = {name: _printable(v) if isinstance(v, str) else v for name, v in options.items()}
        if name == "wandb":  # resumes by id, trackio by name
            settings |= {"dir": str(folder), "id": _run_id(folder, resumes=resumes)}
        try:
            self._module = importlib.import_module(name)
            self._module.init(**settings, resume="allow" if resumes else "never")
        except Exception as error:
            problem = describe(error).rstrip(".")
            raise UserError(f"--report_to {name}: {problem}; fix that, or leave {name} out") from error

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self._call("log", dict(scalars), step=step)

    def close(self) -> None:
        self._call("finish")

    def _call(self, function: str, *arguments: Any, **options: Any) -> None:
        if not self._works:
            return
        try:
            getattr(self._module, function)(*arguments, **options)
        except Exception as error:
            self._works = False
            log.warning(f"{self._name} receives no further metrics ({describe(error)}); metrics.jsonl has them")


def _run_id(folder: Path, *, resumes: bool) -> str:
    """Return the id of a run in wandb: that of the resumed run, else a new one."""
    path = folder / RUN_ID
    if resumes and path.is_file():
        return read_text(path).strip()
    remove_special(path)
    write_text(path, number := uuid.uuid4().hex)
    return number


def _printable(value: Any) -> str:
    """Return a value as text; bytes of file names that are not UTF-8 become escapes."""
    return str(value).encode(errors="backslashreplace").decode()


class EventFile:
    """A TensorBoard event file, flushed after each event.

    torch's SummaryWriter writes in a thread, which prints a traceback if the disk is full.

    Args:
        folder: the folder of the file.
        options: the options of the run, which TensorBoard lists as hyper-parameters.
        purge_step: TensorBoard hides events of earlier files from this step on.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any], purge_step: int | None = None):
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        remove_special(folder, keep_folder=True)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}"
        number = 0
        while (path := folder / f"{name}.{number}").exists():
            number += 1
        self._path = path
        self._file = path.open("xb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))
        if options:
            self._write_options(options)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Write scalars, a dict from tag to value."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(step=step, summary=Summary(value=values))

    def _write_options(self, options: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        values = {name: v if isinstance(v, (bool, int, float)) else _printable(v) for name, v in options.items()}
        for summary in hparams(values, dict.fromkeys(SHOWN_METRICS)):
            self._write(summary=summary)

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        with named_errors(self._path):
            self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
            self._file.flush()

    def close(self) -> None:
        with named_errors(self._path):
            self._file.close()
