"""results.json and options.json: what a run found, and what it was told."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from clip_retrieval.errors import UserError
from clip_retrieval.files import write_text
from clip_retrieval.options import Options

PACKAGES = ("torch", "torchvision", "open_clip_torch", "numpy", "pillow")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON atomically. Raises OSError if the place cannot be written."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """A results.json. Raises UserError, naming it, where it is missing or something else."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        results["i2t"]["R@1"], results["t2i"]["R@1"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such results file") from None
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(f"{path} is not a results.json of a finetune or an evaluation") from None
    return results


def write_options(folder: Path, options: Options, device: str) -> None:
    """options.json: all options, then the versions and the device they ran on."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions["python"] = platform.python_version()
    content = options.flat() | {"versions": versions, "device_used": device}
    write_json(folder / "options.json", content)
