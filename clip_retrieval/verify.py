"""Compare evaluations of named models with published numbers, and name what usually causes a gap.

python scripts/verify.py DATA --models ViT-B/32 ViT-B-16-SigLIP2
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_retrieval.data.catalog import KNOWN_SIZES
from clip_retrieval.errors import RunError, UserError, one_line
from clip_retrieval.files import read_text, write_json
from clip_retrieval.log import log, start_log
from clip_retrieval.reporting.results import read_results
from clip_retrieval.reporting.table import RECALLS
from clip_retrieval.run.folder import make_folder

PUBLISHED = Path(__file__).with_name("reporting") / "published.csv"
TOLERANCE = 0.3  # percent; two correct evaluations agree within this
METRICS = tuple(f"{direction} {recall}" for direction in ("i2t", "t2i") for recall in RECALLS)
CHINESE = ("flickr30k_cn", "coco_cn", "muge")
"""Data sets in Chinese-CLIP's format. MUGE is scored on its val split."""
QUICK_GELU = ("openai", "dfn", "metaclip")
"""Beginnings of the tags of weights that were trained with QuickGELU."""


@dataclass(frozen=True)
class Published:
    """A published result: recalls in percent, by "i2t R@1" and so on, as far as they are published."""

    model: str
    pretrained: str
    dataset: str
    recalls: dict[str, float]
    source: str

    @property
    def name(self) -> str:
        """MODEL:TAG, or the model if its weights have no tag."""
        return f"{self.model}:{self.pretrained}" if self.pretrained else self.model


def read_published(path: Path = PUBLISHED) -> list[Published]:
    """Read a CSV with the columns model, pretrained, dataset, METRICS and source; recalls may be missing.

    Raises UserError, naming file and line, if it is invalid.
    """
    rows = []
    for line, row in enumerate(csv.DictReader(io.StringIO(read_text(path))), start=2):
        try:
            recalls = {name: float(row[name]) for name in METRICS if row[name]}
            texts = [row[name] for name in ("model", "pretrained", "dataset", "source")]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}, line {line}: invalid or missing {error}; the columns are those of {PUBLISHED}"
            ) from None
        if not recalls or None in texts:
            raise UserError(f"{path}, line {line}: no recalls; give at least one of {', '.join(METRICS)}")
        if not all(0 <= value < float("inf") for value in recalls.values()):
            raise UserError(f"{path}, line {line}: a recall is no number of percent; correct it")
        rows.append(Published(texts[0], texts[1], texts[2], recalls, texts[3]))
    if not rows:
        raise UserError(f"{path}: holds no results; its columns must be those of {PUBLISHED}")
    return rows


def select(rows: list[Published], dataset: str, models: Collection[str]) -> list[Published]:
    """Select the results on a data set, of the models named MODEL or MODEL:TAG (default: all).

    Raises UserError if there are none, or a model has none.
    """
    found = [row for row in rows if row.dataset == dataset]
    if not found:
        names = ", ".join(dict.fromkeys(row.dataset for row in rows))
        raise UserError(f"--dataset {dataset}: no published numbers; choose from {names}")
    for name in models:
        if not any(name in (row.model, row.name) for row in found):
            raise UserError(f"--models {name}: no published numbers on {dataset}; --list prints the models")
    return [row for row in found if not models or {row.model, row.name} & set(models)]


def verify(
    typed: dict[str, Any],
    data: Path,
    dataset: str = "coco",
    models: Collection[str] = (),
    table: Path = PUBLISHED,
    output: Path = Path("logs/verify"),
) -> None:
    """Evaluate models, and compare them with published numbers. Writes verify.json, and each results.json beside it.

    Args:
        typed: options of the command line, such as pretrained: a file of weights instead of the published ones.
        data: the folder of the data set.
        dataset, models: see `select`.
        table: the published numbers.
        output: the folder of the results.

    Raises RunError if a model could not be evaluated, or is not within TOLERANCE.
    """
    from clip_retrieval.evaluate import evaluate

    rows = select(read_published(table), dataset, models)
    if not data.is_dir():  # else each model would fail in turn
        raise UserError(f"{data}: no such folder; give the folder of the data set")
    if "pretrained" in typed and len(rows) > 1:
        raise UserError(f"--pretrained is for one model, not for {len(rows)}; give --models MODEL")
    make_folder(output, "--output")
    lines, records = [], []
    for row in rows:
        name = re.sub(r"[^\w.@-]+", "-", f"{row.name}_{dataset}")
        place = {"dataset": "chinese" if dataset in CHINESE else dataset, "dataset_root": str(data)}
        place |= {"eval_split": "val"} if dataset == "muge" else {}
        weights = {"pretrained": row.pretrained} if row.pretrained else {}
        folder = {"checkpoint_path": str(output), "experiments": name}
        try:
            evaluate({"eval": True, "vision_model": row.model, **weights, **place, **folder, **typed})
        except UserError as error:  # such as weights that cannot be downloaded
            lines += [f"{row.name}: not evaluated: {error}"]
            records.append({"model": row.model, "pretrained": row.pretrained, "status": "error", "error": str(error)})
            continue
        record = compare(row, read_results(output / name / "results.json"), typed)
        lines.append(describe(record))
        records.append(record)
    write_json(output / "verify.json", {"dataset": dataset, "tolerance": TOLERANCE, "models": records})
    start_log()  # the log.txt of the last evaluation ends
    log.info("\n".join(["", *lines]))
    log.info(f"wrote {output / 'verify.json'}")
    if failed := sum(record["status"] != "ok" for record in records):
        raise RunError(
            f"{failed} of {len(records)} models are not within {TOLERANCE} of their published numbers, or not evaluated"
        )


def compare(row: Published, results: dict[str, Any], typed: dict[str, Any]) -> dict[str, Any]:
    """Compare the recalls of a results.json with the published ones, in percent."""
    found = {name: results[name.split()[0]][name.split()[1]] for name in row.recalls}
    gap = max((found[name] - value for name, value in row.recalls.items()), key=abs)
    is_close = abs(gap) <= TOLERANCE + 1e-9
    return {
        "model": row.model,
        "pretrained": row.pretrained,
        "source": row.source,
        "status": "ok" if is_close else "gap",
        "gap": gap,
        "published": row.recalls,
        "found": found,
        "causes": [] if is_close else find_causes(row, results, gap, typed),
    }


def find_causes(row: Published, results: dict[str, Any], gap: float, typed: dict[str, Any]) -> list[str]:
    """Name the differences that results.json shows, then what usually causes a gap of this size and this model."""
    # differences that are certain
    causes = []
    known = KNOWN_SIZES.get((row.dataset, results["split"]))
    sizes = results["images"], results["captions"]
    if known and sizes not in known:
        causes.append(
            f"split: {sizes[0]:,} images and {sizes[1]:,} captions instead of {known[0][0]:,} and {known[0][1]:,}"
        )
    if typed.get("pretrained"):
        causes.append(f"weights: {typed['pretrained']} instead of {row.pretrained or 'those of the model'}")
    if results["precision"] != "fp32":
        causes.append(f"precision: {results['precision']}; the default is fp32")
    if results["decoder"] != "pillow":
        causes.append(f"decoder: the pixels of {results['decoder']} differ by grey levels; the default is pillow")
    if results.get("caption_prefix"):
        causes.append(f"prompt: --caption_prefix {results['caption_prefix']!r}; published numbers use plain captions")
    # what is usual
    if abs(gap) > 1 and row.pretrained.startswith(QUICK_GELU):
        causes.append("QuickGELU: these weights need it; the log says which activation is used")
    if "SigLIP2" in row.model:
        causes.append("lower-casing: SigLIP2 needs lower-cased text (COCO: 65.0 / 48.6 without, 68.9 / 52.1 with)")
    if "SigLIP" in row.model:
        causes.append("preprocessing: SigLIP squashes images to a square, and does not crop them")
    if not causes or abs(gap) <= 1:
        causes.append("preprocessing: images that were resized or compressed again before; another interpolation")
        causes.append("split: Karpathy's test split, with five captions per image")
    return causes


def describe(record: dict[str, Any]) -> str:
    """A line for a model within the tolerance; for others also the numbers and the causes."""
    pairs = [f"{name} {record['found'][name]:.2f} ({value:.2f})" for name, value in record["published"].items()]
    shown = [pair for pair in pairs if "R@1 " in pair]
    name = one_line(" ".join(text for text in (record["model"], record["pretrained"]) if text))
    lines = [f"{record['status']:5}{name}: {', '.join(shown)}", f"     largest gap {record['gap']:+.2f}"]
    return "\n".join([*lines, *(f"     cause? {cause}" for cause in record["causes"])])
