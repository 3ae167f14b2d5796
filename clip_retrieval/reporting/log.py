"""What a run says: on the terminal, in log.txt, in metrics.jsonl and in TensorBoard."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from clip_retrieval.errors import one_line, printable, silence

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("clip_retrieval")


class _TerminalHandler(logging.Handler):
    """Writes above a progress bar instead of through it; warnings go to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        try:
            tqdm.write(self.format(record), file=stream)
            stream.flush()  # a log that is a file or a pipe shows the line now, not pages later
        except BrokenPipeError:
            # Nobody reads any more (`| head`): the run goes on, and log.txt has everything.
            silence(stream)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        return f"WARNING: {one_line(message)}" if record.levelno >= logging.WARNING else printable(message)


class _FileFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Kept(logging.Handler):
    """Keeps what is said before there is a folder to write it to."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def is_main() -> bool:
    """Whether this process speaks: the first, where torchrun started several."""
    return os.environ.get("RANK", "0") == "0"


def progress_bar(*arguments: Any, **options: Any) -> tqdm:
    """A tqdm bar, on a terminal, of the process that speaks."""
    if "desc" in options:
        options["desc"] = one_line(options["desc"])
    return tqdm(*arguments, disable=None if is_main() else True, **options)


def start_log() -> None:
    """Say everything on the terminal from here on."""
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    terminal = _TerminalHandler()
    terminal.setFormatter(_Formatter())
    if is_main():
        log.addHandler(terminal)
        log.addHandler(_Kept())
    else:
        log.addHandler(logging.NullHandler())


def log_to_file(folder: Path) -> None:
    """Write what has been said since `start_log`, and all that follows, to `folder`/log.txt as well."""
    file = logging.FileHandler(folder / "log.txt", encoding="utf-8", errors="backslashreplace")
    file.setFormatter(_FileFormatter("%(asctime)s %(levelname)s %(message)s"))
    for kept in [handler for handler in log.handlers if isinstance(handler, _Kept)]:
        log.removeHandler(kept)
        for record in kept.records:
            file.handle(record)
    log.addHandler(file)


class MetricsLog:
    """Numbers over steps: one line each in metrics.jsonl, and TensorBoard scalars.

    Args:
        folder: the run's folder.
        keep: for a run that goes on, the last step of each kind that stays; what a killed run wrote after it is
            taken back, for it will be written again.
    """

    def __init__(self, folder: Path, keep: Mapping[str, int] | None = None):
        self._path = folder / "metrics.jsonl"
        kept = [line for line in self._read() if _is_kept(json.loads(line), keep or {})]
        self._path.write_text("".join(kept), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = _open_tensorboard(folder / "tensorboard", max(keep.values()) + 1 if keep else None)

    def _read(self) -> list[str]:
        if not self._path.is_file():
            return []
        # A killed run may have left half a line.
        return [line for line in self._path.read_text(encoding="utf-8").splitlines(True) if line.endswith("}\n")]

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Record `values` (numbers, or dicts of them) of `kind` ("train", "val", ...) at `step`."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        if self._tensorboard is None:
            return
        for name, value in _flatten(values, kind):
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _open_tensorboard(folder: Path, purge_step: int | None) -> SummaryWriter | None:
    """The writer of TensorBoard's files; None, with a warning, for a folder whose name is not UTF-8."""
    from torch.utils.tensorboard import SummaryWriter

    try:
        str(folder).encode()
    except UnicodeEncodeError:
        log.warning(f"{folder}: TensorBoard takes no names that are not UTF-8; metrics.jsonl has the same numbers")
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)


def _is_kept(line: dict[str, Any], keep: Mapping[str, int]) -> bool:
    return line["step"] <= keep.get(line["kind"], -1)


def _flatten(values: dict[str, Any], prefix: str):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}/{name}")
        elif isinstance(value, (int, float)):
            yield f"{prefix}/{name}", value
