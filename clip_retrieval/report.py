"""Write a report of a finished run: encode its split again, and show what the model retrieves.

python scripts/report.py logs/ex0                       # a finetune: its best checkpoint on its test split
python scripts/report.py logs/ex0/eval_coco_test        # an evaluation: its model and data
python scripts/report.py logs/ex0 logs/ex1              # two runs: queries won and lost
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from clip_retrieval.config import read_config
from clip_retrieval.distributed import SINGLE_PROCESS
from clip_retrieval.errors import UserError
from clip_retrieval.log import log, start_log
from clip_retrieval.options import DataOptions, EvalOptions, ModelOptions
from clip_retrieval.reporting.html.write import Evaluated, name_run, write_report
from clip_retrieval.reporting.results import REPORT, read_results
from clip_retrieval.run.evaluation import Evaluation
from clip_retrieval.run.settings import settle_options

STORED = ("before", "val", "rerank", "retention_before", "retention", "zero_shot_before", "zero_shot")
"""Blocks of results.json that a report takes as they are."""


def report(run: Path, other: Path | None, output: Path | None, typed: dict[str, Any]) -> None:
    """Write the report of a run's folder, compared with another one.

    Args:
        run: the folder of a finetune or an evaluation.
        other: the folder of another one on the same data.
        output: the file to write (default: report.html in `run`).
        typed: the options of the command line, by name; they replace those of the runs.

    Raises UserError if a folder is not one of a run.
    """
    start_log()
    evaluated = [evaluate_run(folder, typed) for folder in (run, other) if folder is not None]
    write_report(output or run / REPORT, *evaluated)


def evaluate_run(folder: Path, typed: dict[str, Any]) -> Evaluated:
    """Encode and score the split of a run with its model."""
    # the results, if the run is complete
    log.info(f"{folder}:")
    stored = read_results(folder / "results.json") if (folder / "results.json").is_file() else {}
    split = {"eval_split": "val"} if stored.get("split") == "val" else {}  # of a finetune without a test split

    # encode and score
    options, checkpoint = settle_options({"eval": True, **find_options(folder, typed), **split, **typed})
    evaluation = Evaluation.prepare(options, checkpoint, SINGLE_PROCESS)
    scores = evaluation.score()
    results = scores.results

    # add those that are not computed again
    results = {name: stored[name] for name in STORED if name in stored} | results
    name = name_run(checkpoint.path if checkpoint else None, results["model"])
    return Evaluated(name, evaluation.dataset, scores.encoded, scores.ranks, results, folder / "metrics.jsonl")


def find_options(folder: Path, typed: dict[str, Any]) -> dict[str, Any]:
    """The options that give the model and the data of a run: a checkpoint, or those in options.json.

    Raises UserError if the folder is not one of a run.
    """
    # a finetune
    for name in ("best.pt", "last.pt"):
        if (folder / name).is_file():
            return {"resume": str(folder / name)}
    # an evaluation
    if not (folder / "options.json").is_file():
        raise UserError(f"{folder}: no best.pt and no options.json; give the folder of a finetune or of an evaluation")
    stored = read_config(folder / "options.json")
    groups: list[type] = [DataOptions, EvalOptions]
    if "resume" in stored:
        checkpoint = Path(stored["resume"])
        if not checkpoint.exists():  # the runs have moved
            stored["resume"] = str(folder.parent / checkpoint.name)
    else:
        groups.append(ModelOptions)
    names = {"resume", "device", *(field.name for group in groups for field in dataclasses.fields(group))}
    names -= {"rerank"}  # which a report does not show
    return {name: value for name, value in stored.items() if name in names}
