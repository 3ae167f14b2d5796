"""Checkpoints: plain dicts of tensors and primitives, written so that a crash never leaves half a file."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import torch

from clip_retrieval.errors import RunError, reason
from clip_retrieval.files import write_atomic
from clip_retrieval.signals import deferred


class _Recorder:
    """Keeps the error of a write: on its way through torch.save's C++ it would lose its cause."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write `content` atomically. Raises RunError if it cannot be written; the file from before is kept.

    A loader process that is lost meanwhile is reported afterwards: torch tells by an exception out of its SIGCHLD
    handler, which inside torch.save would look like a failed write.
    """
    try:
        with deferred(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else nullcontext(), write_atomic(path) as file:
            recorder = _Recorder(file)
            try:
                torch.save(content, recorder)
            except RuntimeError:
                if recorder.error is None:
                    raise
                raise recorder.error from None
    except OSError as error:
        raise RunError(
            f"could not write {path} ({reason(error)}); the checkpoint from before is kept. Free some space or check "
            "the disk, then resume with --resume auto"
        ) from error
