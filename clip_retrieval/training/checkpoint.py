"""Checkpoints: plain dicts of tensors and primitives, written so that a crash never leaves half a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import torch

from clip_retrieval.errors import RunError, describe
from clip_retrieval.files import write_atomic


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
    """Write `content` atomically. Raises RunError if it cannot be written; the file from before is kept."""
    try:
        with write_atomic(path) as file:
            recorder = _Recorder(file)
            try:
                torch.save(content, recorder)
            except RuntimeError:
                if recorder.error is None:
                    raise
                raise recorder.error from None
    except OSError as error:
        raise RunError(
            f"could not write {path} ({describe(error)}); the checkpoint from before is kept. Free some space or check "
            "the disk, then resume with --resume auto"
        ) from error
