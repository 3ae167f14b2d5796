"""Write report.html of an evaluated model, alone or beside another one on the same data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from clip_retrieval import __version__
from clip_retrieval.data.dataset import KeyedImages, RetrievalDataset
from clip_retrieval.errors import UserError, printable
from clip_retrieval.evaluation.evaluator import SplitFeatures
from clip_retrieval.evaluation.ranks import Ranks
from clip_retrieval.files import open_regular, write_text
from clip_retrieval.jsonl import parse_record
from clip_retrieval.log import log
from clip_retrieval.reporting.html.collect import collect
from clip_retrieval.reporting.html.measure import Measured, measure
from clip_retrieval.reporting.html.page import Page, is_number, render
from clip_retrieval.reporting.html.plots import draw_plots, draw_training

MOST_METRICS = 2**26  # bytes of metrics.jsonl, half a million lines


PROTOCOLS = {
    "coco_1k": "COCO 1K, mean of folds",
    "eccv": "ECCV Caption",
    "cxc": "CxC",
    "map_at_r": "positives of the data",
}


@dataclass(frozen=True)
class Evaluated:
    """A model's features of a split, and its results.

    Attributes:
        name: of the run, for the page.
        dataset: the split.
        features: its features.
        ranks: those of the images and of the captions.
        results: the content of results.json: the block of the split, and `before` and `val` of a finetune.
        metrics: metrics.jsonl of a finetune, if any.
    """

    name: str
    dataset: RetrievalDataset
    features: SplitFeatures
    ranks: tuple[Ranks, Ranks]
    results: dict[str, Any]
    metrics: Path | None = None

    def measure(self) -> Measured:
        return measure(self.features.images, self.features.captions, self.dataset.pairs, *self.ranks)


def write_report(path: Path, run: Evaluated, other: Evaluated | None = None) -> None:
    """Write the report of a run, compared with another one if it is given.

    Raises UserError if the runs are not of the same data, OSError if the file cannot be written.
    """
    # measure, and choose what to show
    if other is not None:
        check_same_data(run, other)
    measured, measured_other = run.measure(), other.measure() if other else None
    names = distinguish(printable(run.name), printable(other.name) if other else "")
    facts = collect(measured, run.dataset, measured_other)
    labelled = [(f"{name}: ", each) for name, each in zip(names, (run, other)) if each] if other else [("", run)]
    models = dict.fromkeys(str(each.results.get("model", "")) for each in (run, other) if each)

    # render
    trained = run.results.get("images_trained_on")
    warnings = [f"The model was trained on {trained:,} of these images; others may be harder."] if trained else []
    content = render(
        Page(
            title=f"{names[0]} and {names[1]}" if other else f"{names[0]} on {run.dataset.name} {run.dataset.split}",
            subtitle=printable("; ".join((*map(_shorten, models), run.dataset.describe()))),
            about=describe(run, other),
            warnings=warnings,
            blocks=choose_blocks(run, other, names),
            further=dict(entry for label, each in labelled for entry in list_further(each.results, label)),
            notes=list(dict.fromkeys(note for _, each in labelled for note in describe_rerank(each.results))),
            zero_shot=[line for label, each in labelled for line in list_zero_shot(each.results, label)],
            names=names,
            facts=facts,
            plots=draw_plots(measured, measured_other, names),
            training=draw_training(list(read_metrics(run.metrics))) if run.metrics else [],
            images=run.dataset.images,
        )
    )

    # write
    write_text(path, content)
    log.info(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def name_run(checkpoint: Path | None, model: str) -> str:
    """The name of a run on the page: its checkpoint's folder, or its model without one."""
    return checkpoint.resolve().parent.name if checkpoint else model


def check_same_data(run: Evaluated, other: Evaluated) -> None:
    """Raise UserError unless both runs are of the same images, captions and pairs."""
    a, b = run.dataset, other.dataset
    same = list(a.captions) == list(b.captions) and a.pairs.tolist() == b.pairs.tolist()
    if not same or _image_names(a) != _image_names(b):
        raise UserError(
            f"{run.name} is evaluated on {a.describe()}, {other.name} on {b.describe()}, which are not the same; give "
            "the data of both with --dataset, --dataset_root and --eval_split"
        )


def _image_names(dataset: RetrievalDataset) -> list[str]:
    images = dataset.images
    name = images.key if isinstance(images, KeyedImages) else images.name
    return [name(index) for index in range(len(images))]


def distinguish(name: str, other: str) -> tuple[str, str]:
    """Two names for the page, which differ."""
    return (name, other) if name != other else (f"{name} (1)", f"{other} (2)")


def choose_blocks(run: Evaluated, other: Evaluated | None, names: tuple[str, str]) -> dict[str, dict[str, Any]]:
    """The blocks of results to list, by label: before and after a finetune, its val split, and the other run."""
    results, split = run.results, run.dataset.split
    if other is not None:
        return dict(zip(names, (results, other.results)))
    before, val = results.get("before"), results.get("val")
    blocks = {}
    if isinstance(before, dict) and before.get("split") == split:
        blocks[f"{split}, before training"] = before
    blocks[f"{split}, trained" if blocks else split] = results
    if isinstance(val, dict) and split != "val":
        blocks["val, trained"] = val
    return blocks


def list_further(results: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the blocks of protocols, of re-ranking, and of retention before and after training, by label."""
    for name, block in _get_blocks(results, "protocols"):
        yield prefix + PROTOCOLS.get(name, printable(name)), block
    for name, block in _get_blocks(results, "rerank"):
        yield f"{prefix}re-ranked, {printable(name)}", block
    for key, stage in (("retention_before", "before training"), ("retention", "trained")):
        if isinstance(retained := results.get(key), dict):
            yield f"{prefix}{_name_data(retained)}, {stage}", retained


def describe_rerank(results: dict[str, Any]) -> Iterator[str]:
    """Yield the further data that each method of re-ranking uses, unlike plain recall."""
    for name, block in _get_blocks(results, "rerank"):
        key = next((key for key in ("temperature", "k", "share") if is_number(block.get(key))), None)
        chosen = f"; {key} {block[key]:.3g} ({block.get('chosen_on', '')})" if key else ""
        yield printable(f"Re-ranked, {name}: uses {block.get('uses', 'further data')}{chosen}.")


def list_zero_shot(results: dict[str, Any], prefix: str) -> Iterator[tuple[str, tuple[float | None, ...]]]:
    """Yield the accuracy of --zero_shot_eval before and after training, by label."""
    for key, stage in (("zero_shot_before", "before training"), ("zero_shot", "trained")):
        if isinstance(block := results.get(key), dict):
            values = (block.get(name) for name in ("top1", "top5"))
            yield (
                f"{prefix}{_name_data(block)}, {stage}",
                tuple(value if is_number(value) else None for value in values),
            )


def _shorten(model: str) -> str:
    """The last part of a path; other names of models stay."""
    return Path(model).stem if Path(model).is_absolute() else model


def _get_blocks(results: dict[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    blocks = results.get(key)
    return [(k, v) for k, v in blocks.items() if isinstance(v, dict)] if isinstance(blocks, dict) else []


def _name_data(block: dict[str, Any]) -> str:
    return printable(" ".join(str(block[name]) for name in ("dataset", "split") if name in block))


def describe(run: Evaluated, other: Evaluated | None) -> list[tuple[str, str]]:
    """The lines about the models, the data and this page."""
    lines = []
    for each in (run, other) if other else (run,):
        prefix = f"{each.name}: " if other else ""
        for name in ("model", "weights", "step", "precision", "decoder"):
            if isinstance(value := each.results.get(name), (str, int, float)):
                lines.append((prefix + name, str(value)))
    return [
        ("data", run.dataset.describe()),
        *((printable(name), printable(value)) for name, value in lines),
        ("features encoded", datetime.now().astimezone().isoformat(" ", "minutes")),
        ("clip_retrieval", __version__),
    ]


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics.jsonl. Damaged lines, which a killed run may leave, are skipped."""
    if not path.is_file():
        return
    with open_regular(path) as file:
        for line in file.read(MOST_METRICS).splitlines():
            with contextlib.suppress(ValueError):
                yield parse_record(line)
