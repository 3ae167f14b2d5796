"""Score a model on Winoground, SugarCrepe or ARO: does it tell apart captions that differ in a word or its place?

python scripts/pair_tasks.py --task sugarcrepe --data sugar-crepe/data --image_dir val2017 --resume logs/ex0/best.pt
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from clip_retrieval.data.pair_tasks import Examples, PairTask, read_task
from clip_retrieval.errors import format_counts
from clip_retrieval.evaluation.evaluator import SplitFeatures
from clip_retrieval.evaluation.pair_scores import (
    MIN_ATTRIBUTES,
    group_accuracies,
    score_choices,
    score_winoground,
    summarize,
)
from clip_retrieval.log import log
from clip_retrieval.reporting.table import align
from clip_retrieval.run.ensemble import Ensemble
from clip_retrieval.run.tool import run_tool

SYMMETRIC = Path(__file__).with_name("evaluation") / "aro_symmetric.json"
"""Relations that ARO's notebook leaves out of its macro accuracy, as symmetric."""


def score_pair_tasks(typed: dict[str, Any], task: str, data: Path, image_dir: Path, output: Path | None = None) -> None:
    """Score the model of the options on a task, and write results.json.

    Args:
        typed: options of the command line about the model and its evaluation.
        task: a name of `data.pair_tasks.TASKS`.
        data: the published file of examples, or the folder of the files.
        image_dir: the folder of the images.
        output: folder of the results.
    """
    run_tool(typed, lambda: _read(task, data, image_dir), _score, output)


def _read(name: str, data: Path, image_dir: Path) -> PairTask:
    task = read_task(name, data, image_dir)
    number = sum(len(examples.images) for examples in task.categories.values())
    log.info(f"{name}: {format_counts(example=number)}")
    return task


def _score(ensemble: Ensemble, task: PairTask) -> tuple[dict[str, Any], str]:
    """The content of results.json, and the table."""
    encoded = ensemble.encode(task.dataset)
    score = _winoground if task.name == "winoground" else _choices
    categories = {name: score(encoded, examples) for name, examples in task.categories.items()}
    results: dict[str, Any] = {"task": task.name, "images": len(task.dataset.images), "categories": categories}
    columns = ("text", "image", "group") if task.name == "winoground" else ("accuracy", "macro_accuracy")
    if task.name != "winoground":
        results["mean"] = float(
            np.mean([block.get("macro_accuracy", block["accuracy"]) for block in categories.values()])
        )
    return results, _table(results, columns)


def _choices(encoded: SplitFeatures, examples: Examples) -> dict[str, Any]:
    """The scores of a category of examples with one image; with groups, also ARO's mean over them."""
    image, options = np.array(examples.images)[:, 0], np.array(examples.captions)
    values, ties = score_choices(encoded.images, encoded.captions, image, options)
    block = summarize(values, ties)
    groups = group_accuracies(values, examples.groups)
    if list(groups) == [""]:
        return block
    symmetric, is_attributes = set(json.loads(SYMMETRIC.read_text())), all("_" in group for group in groups)
    counted = [
        group["accuracy"]
        for name, group in groups.items()
        if name not in symmetric and (not is_attributes or group["examples"] >= MIN_ATTRIBUTES)
    ]
    macro = {"macro_accuracy": float(np.mean(counted))} if counted else {}
    return block | macro | {"groups": groups}


def _winoground(encoded: SplitFeatures, examples: Examples) -> dict[str, Any]:
    """Text, image and group score in percent, overall and by tag."""
    images, captions = np.array(examples.images), np.array(examples.captions)
    scores = score_winoground(encoded.images, encoded.captions, images, captions)
    ties = scores.pop("ties")
    block: dict[str, Any] = {name: 100 * float(values.mean()) for name, values in scores.items()}
    by_tag = {name: group_accuracies(values, examples.groups) for name, values in scores.items()}
    tags: dict[str, Any] = {}
    for tag, found in by_tag["text"].items():
        tags[tag] = {"examples": found["examples"]} | {name: by_tag[name][tag]["accuracy"] for name in scores}
    return block | {"examples": len(images), "ties": int(ties.sum()), "groups": tags}


def _table(results: dict[str, Any], columns: tuple[str, ...]) -> str:
    """A line for each category, and for each tag of Winoground; scores in percent."""
    rows = {}
    for name, block in results["categories"].items():
        rows[name] = block
        if "text" in block:
            rows |= {f"  {tag or 'no tag'}": found for tag, found in block["groups"].items()}
    if "mean" in results:
        rows["mean"] = {"accuracy": results["mean"]}
    shown = [column for column in columns if any(column in row for row in rows.values())]
    lines = [[results["task"], *(column.replace("_", " ") for column in shown), "examples"]]
    for name, row in rows.items():
        cells = [f"{row[column]:.2f}" if column in row else "" for column in shown]
        lines.append([name, *cells, str(row.get("examples", ""))])
    return align(lines)
