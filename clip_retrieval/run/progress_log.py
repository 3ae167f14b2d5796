"""The log lines of a finetune: a step, and the final results."""

from __future__ import annotations

import time
from typing import Any

from clip_retrieval.log import log
from clip_retrieval.reporting.stopwatch import Stopwatch, clock
from clip_retrieval.reporting.table import results_table
from clip_retrieval.run.prepare import Run
from clip_retrieval.training.trainer import StepResult


def log_step(run: Run, result: StepResult, rate: float, watch: Stopwatch) -> None:
    """Log the most recent step, and warn of a collapse. Waits for the device.

    Raises RunError if a loss was not finite.
    """
    # collect the values
    run.trainer.check_finite()
    step, epoch = run.progress.step, -(-run.progress.step // run.schedule.steps_per_epoch)
    loss, scale = result.loss.item(), run.model.clip.logit_scale.exp().item()
    speed, waited = watch.lap()
    values = {
        "epoch": epoch,
        "loss": loss,
        "lr": rate,
        "logit_scale": scale,
        "pairs_per_second": speed,
        "data_percent": waited,
    }
    if run.model.clip.logit_bias is not None:
        values["logit_bias"] = run.model.clip.logit_bias.item()
    accuracy = ""
    if run.options.run.report_training_batch_acc:
        values["i2t_accuracy"], values["t2i_accuracy"] = i2t, t2i = result.accuracy(run.processes)
        accuracy = f"accuracy i2t {i2t:.1f} t2i {t2i:.1f}  "
    # warn of a collapse
    if run.collapse is not None and run.collapse.has_collapsed(loss):
        log.warning(
            f"the loss has stayed at {loss:.4f}, chance for a batch of {run.sampler.batch_size}: the features may have "
            "collapsed to one point; start again with a lower --lr or a longer --warmup"
        )
    # write them
    if run.metrics:
        run.metrics.write("train", step, values)
    left = (run.schedule.total_steps - step) * run.sampler.batch_size / speed
    log.info(
        f"{time.strftime('%H:%M:%S')}  epoch {epoch}  step {step}/{run.schedule.total_steps}  loss {loss:.4f}  "
        f"lr {rate:.2e}  scale {scale:.2f}  {accuracy}{speed:.1f} pairs/s  data {waited:.0f}%  "
        f"{clock(watch.seconds)} trained, {clock(left)} left"
    )


def log_results(run: Run, splits: dict[str, Any], blocks: dict[str, Any]) -> None:
    """Log the table of the final results: before training, the splits, and what is retained of other data.

    `splits` are the blocks of results.json of val and test; `blocks` are those of other evaluations, by name.
    """
    # retrieval
    before = run.progress.before
    lines = {f"before, {before['split']}": before} if before else {}
    lines |= {name: block for name, block in splits.items() if block}
    for name, stage in (("retention_before", "before, "), ("retention", "")):
        if found := blocks.get(name):
            lines[f"{stage}{found['dataset']} {found['split']}"] = found
    # zero-shot classification
    if run.zero_shot is not None:
        stages = {"before": run.progress.zero_shot_before, "after": blocks["zero_shot"]}
        tops = ", ".join(f"{stage} {block['top1']:.2f}" for stage, block in stages.items() if block)
        log.info(f"zero-shot {blocks['zero_shot']['dataset']}, top-1: {tops}")
    if lines:
        log.info(results_table(lines))
