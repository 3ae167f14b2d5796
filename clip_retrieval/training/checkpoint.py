"""Checkpoints: plain dicts of tensors and primitives, written so that a crash never leaves half a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from clip_retrieval.errors import RunError


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to a temporary name, flush it to the disk and rename it. Raises RunError on a full disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:
        if "DataLoader worker" in str(error):
            raise  # a lost loader process is noticed wherever the main one is
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise RunError(
            f"could not write {path} ({reason}); the checkpoint from before is kept. Free some space and go on with "
            "--resume auto"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
