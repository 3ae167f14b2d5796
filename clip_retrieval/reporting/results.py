"""results.json (metrics of a run) and options.json (its settings)."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from clip_retrieval import __version__
from clip_retrieval.errors import UserError
from clip_retrieval.files import read_json, write_json
from clip_retrieval.options import Options

PACKAGES = ("torch", "torchvision", "open_clip_torch", "numpy", "pillow")


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write results.json, with the version of the package. Raises OSError."""
    write_json(folder / "results.json", results | {"version": __version__})


def read_results(path: Path) -> dict[str, Any]:
    """Read a results.json. Raises UserError, naming it, if it is missing or something else."""
    results = read_json(path)
    if not isinstance(results, dict) or not _is_results(results):
        raise UserError(f"{path}: not a results.json; give one of a finetune or an evaluation")
    return results


def _is_results(results: dict[str, Any]) -> bool:
    """Whether the content has the recalls in percent, and the names, that a table needs."""
    blocks: list[Any] = [results.get(direction) for direction in ("i2t", "t2i")]
    if not all(isinstance(block, dict) for block in blocks):
        return False
    numbers = [block.get(name) for block in blocks for name in ("R@1", "R@5", "R@10")]
    are_percent = [type(n) in (int, float) and 0 <= n <= 100 for n in (*numbers, results.get("mean_recall"))]
    return all(are_percent) and all(isinstance(results.get(name, ""), str) for name in ("model", "dataset", "split"))


def write_options(folder: Path, options: Options, device: str) -> None:
    """Write options.json: all options, package versions, device, git commit and command line."""
    versions = {"clip_retrieval": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES}
    versions["python"] = platform.python_version()
    recorded = {"versions": versions, "device_used": device, "git_commit": _git_commit(), "command_line": sys.argv}
    write_json(folder / "options.json", options.flat() | recorded)


def _git_commit() -> str | None:
    """Return the commit of the code, with "+" if files were changed; None outside a git checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or the checkout is another user's
        return None
