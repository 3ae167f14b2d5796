"""The log of a run: the terminal, log.txt, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clip_retrieval.errors import one_line, printable, silence
from clip_retrieval.files import named_errors, open_append, open_regular, remove_special, write_text

log = logging.getLogger("clip_retrieval")

PROGRESS_SECONDS = 30
"""Seconds between progress lines, if standard error is not a terminal."""


class _TerminalHandler(logging.Handler):
    """Writes above a progress bar instead of through it, and warnings to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        try:
            tqdm.write(self.format(record), file=stream)
            stream.flush()  # a pipe or a file would buffer the line
        except BrokenPipeError:
            # The reader has exited (`| head`). The run continues, and log.txt is complete.
            silence(stream)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        return f"WARNING: {one_line(message)}" if record.levelno >= logging.WARNING else printable(message)


class _FileFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _LogFile(logging.StreamHandler):
    """Appends to log.txt. A disk error ends the run; logging would print it for each line."""

    def __init__(self, path: Path):
        self.path = path
        super().__init__(open_append(path))

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            error.filename = str(self.path)
        raise

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a failed write was reported before
            self.stream.close()
        super().close()


class _RecordBuffer(logging.Handler):
    """Keeps the records that are logged before the output folder exists."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def is_main() -> bool:
    """Whether this process writes the log: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def progress_bar(iterable: Iterable[Any] | None = None, *, lines: bool = True, **options: Any) -> tqdm:
    """Make a tqdm bar, which the main process shows.

    If standard error is not a terminal, the bar is a line every PROGRESS_SECONDS, or nothing with lines=False.
    """
    if "desc" in options:
        options["desc"] = one_line(options["desc"])
    if not is_main():
        return tqdm(iterable, disable=True, **options)
    if sys.stderr.isatty() or not lines:
        return tqdm(iterable, disable=None, **options)
    options |= {"mininterval": PROGRESS_SECONDS, "delay": PROGRESS_SECONDS, "miniters": 1, "ncols": 0, "leave": False}
    return _ProgressLines(iterable, **options)


class _ProgressLines(tqdm):
    """A progress bar for a pipe or a file: each state is a line of its own."""

    monitor_interval = 0  # no thread that prints between updates
    _last_line = 0.0

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        # tqdm.write displays all bars again after a line of the log
        if msg is None and time.time() - (self._last_line or self.start_t) >= PROGRESS_SECONDS:
            self._last_line = time.time()
            with contextlib.suppress(BrokenPipeError):  # as in _TerminalHandler
                print(self, file=sys.stderr, flush=True)

    def clear(self, nolock: bool = False) -> None:
        pass  # a line cannot be cleared


def start_log() -> None:
    """Log to the terminal; keep the records for `log_to_file`."""
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    terminal = _TerminalHandler()
    terminal.setFormatter(_Formatter())
    if is_main():
        log.addHandler(terminal)
        log.addHandler(_RecordBuffer())
    else:
        log.addHandler(logging.NullHandler())


def log_to_file(folder: Path) -> None:
    """Log to `folder`/log.txt too, with all records since `start_log`."""
    file = _LogFile(folder / "log.txt")
    file.setFormatter(_FileFormatter("%(asctime)s %(levelname)s %(message)s"))
    for buffer in [handler for handler in log.handlers if isinstance(handler, _RecordBuffer)]:
        log.removeHandler(buffer)
        for record in buffer.records:
            file.handle(record)
    log.addHandler(file)


class MetricsLog:
    """Metrics by step: one line each in metrics.jsonl, and TensorBoard scalars.

    Args:
        folder: the run's folder.
        keep: for a resumed run, the last step to keep of each kind. Later lines are deleted, because the run writes
            them again. Damaged lines are deleted too.

    Every method raises OSError, naming the file, if writing fails.
    """

    def __init__(self, folder: Path, keep: Mapping[str, int] | None = None):
        self._path = folder / "metrics.jsonl"
        remove_special(self._path)
        write_text(self._path, "".join(self._lines_to_keep(keep or {})))
        self._file = open_append(self._path)
        self._tensorboard = _EventFile(folder / "tensorboard", purge_step=max(keep.values()) + 1 if keep else None)

    def _lines_to_keep(self, keep: Mapping[str, int]) -> Iterator[str]:
        if not keep or not self._path.is_file():
            return
        damaged = 0
        with open_regular(self._path) as file:
            for line in file:
                try:
                    content = json.loads(line)
                    keeps = content["step"] <= keep.get(content["kind"], -1)
                # Not JSON, not UTF-8, not a dict, or without the keys. A killed run leaves half a line at the end.
                except (ValueError, TypeError, LookupError, RecursionError):
                    damaged += line.endswith(b"\n")
                    continue
                if keeps:
                    yield json.dumps(content) + "\n"
        if damaged:
            log.warning(f"{self._path}: {damaged:,} damaged lines are skipped")

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write `values` (numbers, or dicts of numbers) of `kind` ("train", "val", ...) at `step`."""
        with named_errors(self._path):
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        self._tensorboard.write(dict(_flatten(values, kind)), step)

    def close(self) -> None:
        with named_errors(self._path):
            self._file.close()
        self._tensorboard.close()


class _EventFile:
    """A TensorBoard event file, flushed after each event.

    torch's SummaryWriter writes in a thread, which prints a traceback if the disk is full.

    Args:
        folder: the folder of the file.
        purge_step: TensorBoard hides events of earlier files from this step on.
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
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

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Write scalars, a dict from tag to value."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(step=step, summary=Summary(value=values))

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        with named_errors(self._path):
            self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
            self._file.flush()

    def close(self) -> None:
        with named_errors(self._path):
            self._file.close()


def _flatten(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}/{name}")
        elif isinstance(value, (int, float)):
            yield f"{prefix}/{name}", value
