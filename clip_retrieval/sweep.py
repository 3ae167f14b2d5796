"""Finetune with different option values, one run after another, and compare the runs.

A sweep is a folder of runs. The same command again skips the complete ones, resumes the others, and tries failed ones
again.
"""

from __future__ import annotations

import math
import signal
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_retrieval.command_line import OptionParser, build_parser
from clip_retrieval.config import read_config
from clip_retrieval.errors import Interrupted, UserError, one_line
from clip_retrieval.files import read_json, write_text
from clip_retrieval.log import log, start_log
from clip_retrieval.options import select_for_resume
from clip_retrieval.reporting.html.sweep_page import render_sweep
from clip_retrieval.reporting.results import has_recalls, read_results
from clip_retrieval.reporting.table import Row, markdown_table, recall_sum, sort_rows
from clip_retrieval.run.folder import lock_folder
from clip_retrieval.run.merge import check_early
from clip_retrieval.signals import StopSignal
from clip_retrieval.sweeping.processes import failure_message, launch, run_all
from clip_retrieval.sweeping.values import SET_BY_SWEEP, Values, name_run, to_arguments

METRICS = (
    *("val rsum", "val mean recall", "val i2t R@1", "val t2i R@1", "rsum", "rsum before"),
    *("retention", "retention before", "zero-shot", "zero-shot before"),
)
"""Columns of the results: `rsum` is of the test split, `retention` an rsum, `zero-shot` a top-1 accuracy."""
SEED = "seed"
MAIN = Path(__file__).parents[1] / "main.py"
COMPLETE, NOT_RUN, RUNNING = "complete", "not run", "running"


def sweep(
    runs: Sequence[Values],
    arguments: Sequence[str],
    output: Path,
    *,
    gpus: Sequence[str] = (),
    sort: str = "val rsum",
    program: Sequence[str] = tuple(launch(MAIN)),
) -> None:
    """Run all runs, and write table.md and sweep.html to `output` after each.

    Raises UserError, before the first run, if a run's options are invalid or its folder holds a run with other options;
    Interrupted after Ctrl-C or SIGTERM, when the runs in progress have saved.

    Args:
        runs: the option values of each run.
        arguments: the arguments of main.py that all runs share.
        output: the folder of the runs.
        gpus: one run at a time on each; with several processes, sets of GPUs (`group_gpus`).
        sort: the column of METRICS by which the table is sorted.
        program: the command of main.py (`launch`).
    """
    start_log()
    if sort not in METRICS:
        raise UserError(f"--sort {sort}: choose from {', '.join(name.replace(' ', '_') for name in METRICS)}")
    with StopSignal().handle_signals() as stop, lock_folder(output, "--output"):
        # check all runs, and skip the complete ones
        parser = build_parser("", prog="main.py")
        named = {name_run(values): values for values in runs}
        options = {name: [*arguments, *to_arguments(values, parser)] for name, values in named.items()}
        for name in named:
            check_run(parser, options[name], output / name)
        states = {name: COMPLETE if (output / name / "results.json").exists() else NOT_RUN for name in named}
        left = [name for name in named if states[name] != COMPLETE]
        log.info(f"{len(named)} runs, {len(named) - len(left)} complete; the table is sorted by {describe_sort(sort)}")

        # run the others
        outputs = output / "output"
        outputs.mkdir(exist_ok=True)
        place = [f"--checkpoint_path={output}", "--resume=auto"]
        commands = {name: [*program, *options[name], *place, f"--experiments={name}"] for name in left}

        def report_start(name: str, path: Path) -> None:
            states[name] = RUNNING
            log.info(f"run {list(named).index(name) + 1} of {len(named)}: {name}; its output is in {path}")

        def report_end(name: str, code: int) -> None:
            is_complete = code == 0 and (output / name / "results.json").exists()
            states[name] = COMPLETE if is_complete else describe_failure(code, outputs / f"{name}.txt")
            log.info(write_summary(output, named, states, sort))

        try:
            run_all(commands, outputs, gpus or (None,), stop, report_start, report_end)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; the run in progress was saved: repeat the command to resume {output}"
            ) from None
        if not left:
            log.info(write_summary(output, named, states, sort))
        log.info(f"wrote {output / 'table.md'} and {output / 'sweep.html'}")


def check_run(parser: OptionParser, arguments: Sequence[str], folder: Path) -> None:
    """Raise UserError if a run's options are invalid, or if its folder holds a run with other options."""
    typed = vars(parser.parse_args(arguments))
    for name in SET_BY_SWEEP:
        if name in typed:
            raise UserError(f"--{name}: a sweep sets it for each run; drop it")
    # overwrite: the folder may hold the run already
    place = {"checkpoint_path": str(folder.parent), "experiments": folder.name, "overwrite": True}
    check_early({**typed, **place}, read_config(typed.get("config")))
    if (folder / "options.json").exists():
        recorded = read_json(folder / "options.json")
        command = recorded.get("command_line") if isinstance(recorded, dict) else None
        if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
            raise UserError(f"{folder / 'options.json'}: without its command line; choose another --output")
        if _fixed(vars(parser.parse_args(command[1:]))) != _fixed(typed):
            raise UserError(f"{folder} holds a run with other options; choose another --output, or delete the folder")


def _fixed(typed: dict[str, Any]) -> dict[str, Any]:
    """The typed options that must be the same when a run resumes."""
    return select_for_resume(typed) | {name: typed[name] for name in ("config", "preset") if name in typed}


def describe_failure(code: int, output: Path) -> str:
    """Return the state of a run that is not complete."""
    message = failure_message(output)
    # -SIGTERM before there was anything to save; torchrun does not pass on the exit codes of its processes
    if code in (Interrupted.exit_code, -signal.SIGTERM) or ": interrupted" in message:
        return "interrupted"
    return f"failed (exit code {code}): {one_line(message, 120)}"


def describe_sort(sort: str) -> str:
    """Return the column, with a warning unless it is measured on the val split."""
    if sort.startswith("val"):
        return f"{sort}: choose options by the val split, never by the test split"
    return f"{sort}, of the test split: a run that is CHOSEN by it looks better than it is; --sort val_rsum"


def write_summary(output: Path, named: dict[str, Values], states: dict[str, str], sort: str) -> str:
    """Write table.md and sweep.html, and return the table for the log: of the means if runs differ by their seed."""
    # a row for each run; metrics that no run has are left out
    changed = list(dict.fromkeys(name for values in named.values() for name in values))
    found = {name: read_metrics(output / name) for name in named}
    metrics = [
        name for name in METRICS if name in (sort, "val rsum", "rsum") or any(row[name] for row in found.values())
    ]
    columns = [*changed, *metrics, "state"]
    blank: Row = dict.fromkeys(changed)
    rows = [{**blank, **values, **found[name], "state": states[name]} for name, values in named.items()]
    rows = sort_rows(rows, sort, columns)
    tables = [markdown_table(rows, columns)]

    # a row for each combination of the other options, with the means over its seeds
    means = average_seeds(rows, changed, metrics, sort)
    if means:
        tables.insert(0, markdown_table(means, list(means[0])))
    write_text(output / "table.md", "\n".join([f"Sorted by {describe_sort(sort)}.\n", *tables]))
    write_text(output / "sweep.html", render_sweep(output.name, rows, columns, sort, describe_sort(sort), means))
    return tables[0]


def average_seeds(rows: Sequence[Row], changed: Sequence[str], metrics: Sequence[str], sort: str) -> list[Row]:
    """Average the runs that differ by --seed alone: `mean ± standard deviation` of each metric, and the number of runs.

    Empty if no two complete runs differ by it. The rows are sorted by their mean of the metric `sort`.
    """
    others = [name for name in changed if name != SEED]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["state"] == COMPLETE:
            groups.setdefault(tuple(row[name] for name in others), []).append(row)
    if SEED not in changed or all(len(group) < 2 for group in groups.values()):
        return []
    averaged: list[tuple[float, Row]] = []
    for key, group in groups.items():
        cells: Row = dict(zip(others, key)) | {"runs": str(len(group))}
        for name in metrics:
            values = [float(row[name]) for row in group if row[name] is not None]  # type: ignore[arg-type]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells[name] = f"{statistics.mean(values):.2f}{spread}" if values else None
        known = [float(row[sort]) for row in group if row[sort] is not None]  # type: ignore[arg-type]
        averaged.append((statistics.mean(known) if known else -math.inf, cells))
    return [cells for _, cells in sorted(averaged, key=lambda item: -item[0])]


def read_metrics(folder: Path) -> Row:
    """Read the METRICS of a run; None without its results.json, or a split."""
    row: Row = dict.fromkeys(METRICS)
    try:
        results = read_results(folder / "results.json")
    except (UserError, OSError):
        return row
    val: Any = results.get("val")
    if has_recalls(val):
        row |= {"val rsum": recall_sum(val), "val mean recall": float(val["mean_recall"])}
        row |= {f"val {direction} R@1": float(val[direction]["R@1"]) for direction in ("i2t", "t2i")}
    if "i2t" in results and results.get("split") == "test":
        row["rsum"] = float(recall_sum(results))
    for column, name in (
        ("rsum before", "before"),
        ("retention", "retention"),
        ("retention before", "retention_before"),
    ):
        if has_recalls(results.get(name)):
            row[column] = float(recall_sum(results[name]))
    for column, name in (("zero-shot", "zero_shot"), ("zero-shot before", "zero_shot_before")):
        block: Any = results.get(name)
        if isinstance(block, dict) and isinstance(block.get("top1"), (int, float)):
            row[column] = float(block["top1"])
    return row
