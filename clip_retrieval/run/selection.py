"""Choose the best model of a run on its val split: the weights, or an average of them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from clip_retrieval.data.batches.split import Split
from clip_retrieval.log import log
from clip_retrieval.run.prepare import Run
from clip_retrieval.run.saving import make_model_checkpoint, save
from clip_retrieval.run.scoring import score_split, score_zero_shot, write_scores
from clip_retrieval.training.average import EMA, SWA

RAW = "none"  # the weights themselves


def evaluate_val(run: Run, val: Split) -> int:
    """Score the weights and their exponential average on val; save the better one as best.pt if it is the best so far.

    When the run ends, the average of --swa_start is scored too. Returns the number of evaluations since the best one:
    the caller stores it with the milestone, because an interrupted evaluation is repeated.
    """
    progress, averages = run.progress, run.trainer.averages
    evaluate_candidate(run, val, RAW)
    if EMA in averages:
        evaluate_candidate(run, val, EMA)
    best = progress.best or {}
    improved = best.get("step") == progress.step and best.get("average") != SWA
    stale = 0 if improved else progress.stale + 1
    if SWA in averages and averages[SWA].updates and ends(run, stale):
        evaluate_candidate(run, val, SWA)
    return stale


def evaluate_candidate(run: Run, val: Split, average: str) -> None:
    """Score the weights (RAW) or an average of them on val, and save them as best.pt if they are the best so far."""
    progress, epoch = run.progress, -(-run.progress.step // run.schedule.steps_per_epoch)
    suffix = "" if average == RAW else f"_{average}"
    with run.trainer.averages[average].applied() if suffix else nullcontext():
        # score
        encoded, block, _ = score_split(run, val)
        batches = run.trainer.validate(encoded.images, encoded.captions, val.dataset, run.sampler.batch_size)
        write_scores(run, f"val{suffix}", block | batches)
        retention = score_retention(run, suffix)
        found: dict[str, Any] = {"step": progress.step, "epoch": epoch, "block": block}
        if run.trainer.averages:
            found["average"] = average
        if retention is not None:
            found["retention"] = retention
        better = progress.best is None or selection_score(run, found) > selection_score(run, progress.best)
        log.info(
            f"epoch {epoch}  step {progress.step}  val rsum {block['rsum']:.2f}  i2t R@1 {block['i2t']['R@1']:.2f}  "
            f"t2i R@1 {block['t2i']['R@1']:.2f}  loss {batches['loss']:.4f}  accuracy i2t {batches['i2t_accuracy']:.1f}"
            f" t2i {batches['t2i_accuracy']:.1f}, in batches of {batches['batch_size']}"
            + f"  ({average} weights)" * bool(suffix)
            + "  best so far" * better
        )
        # save
        if better:
            progress.best = found
            save(run, "best.pt", lambda run: replace(make_model_checkpoint(run), val=block))


def selection_score(run: Run, found: dict[str, Any]) -> float:
    """The score of a candidate for best.pt: val rsum + --retention_weight times its score of what is retained."""
    return found["block"]["rsum"] + run.options.evaluation.retention_weight * found.get("retention", 0.0)


def score_retention(run: Run, suffix: str = "") -> float | None:
    """Score what the model retains: rsum on --retention_dataset, else top-1 accuracy of --zero_shot_eval.

    None without --retention_dataset, unless --retention_weight asks for the accuracy.
    """
    if run.retention is not None:
        return score_retained_split(run, run.retention, f"retention{suffix}")["rsum"]
    if run.zero_shot is not None and selects_by_zero_shot(run):
        return score_zero_shot(run, run.zero_shot, f"zero_shot{suffix}")["top1"]
    return None


def score_retained_split(run: Run, split: Split, kind: str, *, full: bool = False) -> dict[str, Any]:
    """Score the split of --retention_dataset, and log it as `kind`; return its block of results.json."""
    _, block, _ = score_split(run, split, full=full)
    write_scores(run, kind, block)
    log.info(f"retention: {block['dataset']} {block['split']} rsum {block['rsum']:.2f}")
    return block


def selects_by_zero_shot(run: Run) -> bool:
    """Whether best.pt depends on the accuracy of --zero_shot_eval, which is then measured with each val score."""
    return bool(run.options.evaluation.retention_weight) and run.retention is None


def ends(run: Run, stale: int) -> bool:
    """Whether the run ends here: at its last step, or after --patience evaluations without a new best on val."""
    patience = run.options.train.patience
    return run.progress.step >= run.schedule.total_steps or (patience is not None and stale >= patience)


def save_averages(run: Run) -> None:
    """Save ema.pt and swa.pt at the end of a run; warn of a run that ends before the epoch of --swa_start does."""
    for name, average in run.trainer.averages.items():
        if average.updates:
            with average.applied():
                save(run, f"{name}.pt", make_model_checkpoint)
        else:
            log.warning(f"the run ended before epoch {run.options.train.swa_start} did: there is no {name}.pt")
