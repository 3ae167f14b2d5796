"""The log of a run: the terminal and log.txt, and progress bars."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterable
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clip_retrieval.errors import one_line, printable, silence
from clip_retrieval.files import open_append

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
        log.addHandler(MemoryHandler(0))  # keeps the records while it has no target
    else:
        log.addHandler(logging.NullHandler())


def log_to_file(folder: Path) -> None:
    """Log to `folder`/log.txt too, with all records since `start_log`."""
    file = _LogFile(folder / "log.txt")
    file.setFormatter(_FileFormatter("%(asctime)s %(levelname)s %(message)s"))
    for buffer in [handler for handler in log.handlers if isinstance(handler, MemoryHandler)]:
        log.removeHandler(buffer)
        buffer.setTarget(file)
        buffer.close()
    log.addHandler(file)
