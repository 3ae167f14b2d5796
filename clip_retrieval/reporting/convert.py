"""A results.json in the formats of other tools: CLIP_benchmark, Hugging Face's model cards and evaluation results."""

from __future__ import annotations

import json
from typing import Any

import yaml

from clip_retrieval.errors import UserError
from clip_retrieval.reporting.table import RECALLS

TASKS = {"t2i": "image_retrieval", "i2t": "text_retrieval"}
"""CLIP_benchmark names a direction by what it retrieves."""
CLIP_BENCHMARK_DATASETS = {"coco": "mscoco_captions"}


def convert_results(
    results: dict[str, Any], format: str, *, dataset_id: str | None = None, language: str = "en"
) -> str:
    """Convert the top level of a results.json.

    Args:
        results: the content of results.json.
        format: "clip_benchmark" (JSON, fractions), "model_card" (the YAML front matter of a README.md, with the
            model-index) or "eval_results" (YAML for the folder .eval_results of a model repository), both in percent.
        dataset_id: id of the data set on the Hugging Face hub; needed for eval_results.
        language: of the captions, for CLIP_benchmark.

    Raises UserError if results has no recalls, or eval_results lacks the id.
    """
    if "i2t" not in results:
        raise UserError("results.json has no recalls, because the data had neither a val nor a test split")
    dataset, split, model = (str(results.get(name, "")) for name in ("dataset", "split", "model"))
    values = {
        f"{task}_{name.replace('R@', 'recall@')}": round(results[direction][name], 6)
        for direction, task in TASKS.items()
        for name in RECALLS
    }
    if format == "clip_benchmark":
        entry = {
            "dataset": CLIP_BENCHMARK_DATASETS.get(dataset, dataset),
            "model": model,
            "pretrained": str(results.get("weights", "")),
            "task": "zeroshot_retrieval",
            "metrics": {name: round(value / 100, 8) for name, value in values.items()},
            "language": language,
        }
        return json.dumps(entry, ensure_ascii=False) + "\n"
    if format == "model_card":
        metrics = [{"type": name.replace("@", "_at_"), "name": name, "value": value} for name, value in values.items()]
        data = {"type": dataset_id or dataset, "name": dataset, "split": split}
        entries = [{"task": {"type": "image-text-retrieval"}, "dataset": data, "metrics": metrics}]
        card = {"model-index": [{"name": model, "results": entries}]}
        return f"---\n{yaml.safe_dump(card, sort_keys=False, allow_unicode=True)}---\n"
    if dataset_id is None:
        raise UserError("--format eval_results: needs --dataset_id, the id of the data set on the Hugging Face hub")
    notes = f"{split} split of {results.get('images')} images and {results.get('captions')} captions, percent"
    tasks = [
        {"dataset": {"id": dataset_id, "task_id": name.replace("@", "_at_")}, "value": value, "notes": notes}
        for name, value in values.items()
    ]
    return yaml.safe_dump(tasks, sort_keys=False, allow_unicode=True)
