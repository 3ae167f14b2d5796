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


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of the random generators that training draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put the random generators back to `state`; a run that moves to another kind of device keeps the CPU's."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
