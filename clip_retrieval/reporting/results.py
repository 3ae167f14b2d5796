"""results.json (metrics of a run) and options.json (its settings)."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from clip_retrieval import __version__
from clip_retrieval.data.dataset import SPLITS, UNSPLIT
from clip_retrieval.errors import UserError
from clip_retrieval.files import read_json, write_json
from clip_retrieval.log import log
from clip_retrieval.options import Options
from clip_retrieval.reporting.table import RECALLS, Row, results_row

REPORT = "report.html"
RANKS = "ranks.npz"
RANKINGS = ("predictions.jsonl", "tr_predictions.jsonl", "t2i.run", "t2i.qrels", "i2t.run", "i2t.qrels")
"""The files of --save_rankings, after the name of the split."""
PACKAGES = ("torch", "torchvision", "open_clip_torch", "numpy", "pillow")


def delete_derived(folder: Path) -> None:
    """Delete the report, the ranks and the rankings of earlier results, which new ones replace. Raises OSError."""
    rankings = [f"{split}_{name}" for split in {*SPLITS.values(), UNSPLIT} for name in RANKINGS]
    for name in (REPORT, RANKS, *rankings):
        (folder / name).unlink(missing_ok=True)


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write results.json, with the version of the package. Raises OSError."""
    write_json(folder / "results.json", results | {"version": __version__})


def read_results(path: Path) -> dict[str, Any]:
    """Read a results.json. It has no recalls if the run has neither a val nor a test split.

    Raises UserError, naming the file, if it is missing or something else.
    """
    results = read_json(path)
    if not isinstance(results, dict) or not _is_results(results):
        raise UserError(f"{path}: not a results.json; give one of a finetune or an evaluation")
    return results


def read_runs(places: list[Path]) -> list[Row]:
    """Read a row for each results file, run folder, or run in a folder of runs.

    Folders without results, and other results in a folder of runs, get a warning. Raises UserError if a file that the
    user named is something else, or if nothing has results.
    """
    rows: list[Row] = []
    for place in places:
        if not place.is_dir() or (place / "results.json").exists():
            rows.append(_read_run(place))
            continue
        runs = [folder for folder in sorted(place.iterdir()) if (folder / "results.json").is_file()]
        if not runs:
            log.warning(f"{place}: no results.json; it is written at the end of a run")
        for run in runs:
            try:
                rows.append(_read_run(run))
            except UserError as error:  # such as the results of a zero-shot classification
                log.warning(f"skipped: {error}")
    if not rows:
        raise UserError("no results.json in these folders; give folders of complete runs")
    return rows


def _read_run(place: Path) -> Row:
    """Read the row of a results file or a run folder."""
    file = place / "results.json" if place.is_dir() else place
    name = file.absolute().parent.name if file.name == "results.json" else file.stem
    return results_row(read_results(file), _read_options(file.parent), run=name, path=str(place))


def _read_options(folder: Path) -> dict[str, Any]:
    """Read what a table shows of options.json. Empty if it is missing or damaged."""
    try:
        options = read_json(folder / "options.json")
    except (UserError, OSError):
        return {}
    if not isinstance(options, dict):
        return {}
    if isinstance(names := options.get("dataset"), list):  # a mixture
        options["dataset"] = "+".join(str(name) for name in names)
    kinds: dict[str, Any] = {"dataset": str, "loss": str, "lr": (int, float)}
    return {name: options[name] for name, kind in kinds.items() if isinstance(options.get(name), kind)}


def _is_results(results: dict[str, Any]) -> bool:
    """Whether the content has the recalls in percent, and the names, that a table needs."""
    if not all(isinstance(results.get(name, ""), str) for name in ("model", "dataset", "split")):
        return False
    if "before" in results and not has_recalls(results["before"]):
        return False
    is_without_splits = "training_precision" in results and "i2t" not in results
    return is_without_splits or has_recalls(results)


def has_recalls(block: Any) -> bool:
    """Whether a block of results.json has the recalls of both directions, in percent."""
    if not isinstance(block, dict):
        return False
    directions: list[Any] = [block.get(direction) for direction in ("i2t", "t2i")]
    if not all(isinstance(direction, dict) for direction in directions):
        return False
    numbers = [direction.get(name) for direction in directions for name in RECALLS]
    return all(type(n) in (int, float) and 0 <= n <= 100 for n in (*numbers, block.get("mean_recall")))


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
