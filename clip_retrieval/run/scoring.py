"""Score the model of a run: recall on a split, zero-shot accuracy, and their log lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clip_retrieval.classification.report import summary
from clip_retrieval.classification.task import ZeroShotTask, score_task
from clip_retrieval.data.batches.split import Split
from clip_retrieval.errors import NotFiniteError, RunError
from clip_retrieval.evaluation.evaluator import SplitFeatures, encode_split, score
from clip_retrieval.evaluation.ranks import Ranks
from clip_retrieval.log import log
from clip_retrieval.run.prepare import Run
from clip_retrieval.run.splits import describe_prefix

SCORES: tuple[str, ...] = ("i2t", "t2i", "mean_recall", "rsum", "loss", "i2t_accuracy", "t2i_accuracy")
SCORES += ("top1", "top5", "top10", "mean_per_class")


def score_split(
    run: Run, split: Split, *, full: bool = False
) -> tuple[SplitFeatures, dict[str, Any], tuple[Ranks, Ranks]]:
    """Encode and score a split; return its features, its block of results.json, and the ranks of both directions.

    full: with intervals and protocols, see `evaluator.score`.
    """
    options, device = run.options, run.trainer.device
    with _evaluation(run):
        encoded = encode_split(
            run.model,
            split.dataset,
            split.tokens,
            split.pixels,
            options.evaluation,
            num_workers=options.data.num_workers,
            device=device,
            processes=run.processes,
        )
        block, ranks = score(encoded, split.dataset, options.evaluation, run.processes, full=full)
    settings = {"decoder": options.data.decoder} | describe_prefix(options.data)
    return encoded, {"model": run.built.name, **settings, **block}, ranks


def score_zero_shot(run: Run, task: ZeroShotTask, kind: str = "zero_shot") -> dict[str, Any]:
    """Classify the labelled images; return the block of results.json, without the lists of classes and templates."""
    options = run.options
    with _evaluation(run):
        block = score_task(
            run.model,
            task,
            options.evaluation,
            num_workers=options.data.num_workers,
            device=run.trainer.device,
            processes=run.processes,
        )
    write_scores(run, kind, block)
    log.info(f"zero-shot {summary(block)}")
    return {name: value for name, value in block.items() if name not in ("per_class", "templates")}


def write_scores(run: Run, kind: str, block: dict[str, Any]) -> None:
    """Write one line of metrics.jsonl for an evaluation."""
    if run.metrics:
        scores = {name: block[name] for name in SCORES if name in block}
        run.metrics.write(kind, run.progress.step, scores)


@contextmanager
def _evaluation(run: Run) -> Iterator[None]:
    """Make this block interruptible by a signal. Raises RunError if a feature is not finite: the run has diverged."""
    try:
        with run.stop.interruptible():
            yield
    except NotFiniteError as error:
        raise RunError(f"the model has diverged: {error}; start again with a lower --lr or --grad_clip 1") from None
