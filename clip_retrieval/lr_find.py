"""Find a learning rate: raise it at each step, and look where the loss falls and where it diverges.

Smith 2017, Cyclical learning rates for training neural networks (arXiv:1506.01186), section 3.3.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clip_retrieval.data.batches.loader import Loader, TrainBatch
from clip_retrieval.device import choose_device, deterministic_algorithms
from clip_retrieval.distributed import process_group
from clip_retrieval.errors import UserError
from clip_retrieval.files import write_json
from clip_retrieval.log import log, progress_bar, start_log
from clip_retrieval.options import Options
from clip_retrieval.reporting.figures import draw_loss_curve
from clip_retrieval.run.folder import make_folder
from clip_retrieval.run.prepare import prepare
from clip_retrieval.run.settings import settle_options
from clip_retrieval.signals import StopSignal

SMOOTHING = 0.9  # of the mean of the losses
DIVERGED = 4  # times the lowest smoothed loss
LEAST_FALL = 0.01  # share of the first loss


@dataclass(frozen=True)
class Suggestion:
    """Learning rates for --lr.

    Attributes:
        lowest: that of the lowest smoothed loss, which is too high: the loss is about to rise.
        tenth: a tenth of `lowest`, the suggestion.
        steepest: that of the steepest descent of the smoothed loss over the logarithm of the rate.
    """

    lowest: float
    tenth: float
    steepest: float


def lr_find(typed: dict[str, Any], *, min_lr: float, max_lr: float, steps: int, output: Path) -> Suggestion | None:
    """Train for some steps with a growing learning rate, and write the curve and a .json beside it.

    The weights are discarded, and no run's folder is written to.

    Args:
        typed: the options of main.py, by name.
        min_lr, max_lr: the first and the last rate.
        steps: steps between them; fewer if the loss diverges.
        output: the figure, .svg or .png.
    """
    # check
    start_log()
    if not 0 < min_lr < max_lr < math.inf:
        raise UserError(f"--min_lr {min_lr:g} --max_lr {max_lr:g}: the first must be positive, and below the second")
    if steps < 10:
        raise UserError(f"--steps {steps}: must be at least 10")
    if output.suffix not in (".svg", ".png"):
        raise UserError(f"--output {output}: must end in .svg or .png")
    if unfit := [name for name in ("eval", "resume") if typed.get(name)]:
        raise UserError(
            f"--{unfit[0]}: not for lr_find; drop it (--pretrained FILE starts from a checkpoint's weights)"
        )
    make_folder(output.parent, "--output")
    options = _without_outputs(settle_options(typed)[0], max_lr)

    # train, in a folder that is deleted
    rates = np.geomspace(min_lr, max_lr, steps).tolist()
    device = choose_device(options.run.device)
    with (
        tempfile.TemporaryDirectory(prefix="lr_find") as folder,
        StopSignal().handle_signals() as stop,
        process_group(options.run.device) as processes,
        deterministic_algorithms(device, options.train.deterministic),
        stop.interruptible(),
    ):
        run = prepare(options, None, Path(folder), None, stop, processes)
        with closing(run.metrics) if run.metrics else contextlib.nullcontext():
            run.model.train()
            losses: list[float] = []
            with closing(load_batches(run.loader)) as batches, progress_bar(rates, desc="steps", lines=False) as bar:
                for rate in bar:
                    losses.append(run.trainer.step(next(batches), len(losses) + 1, rate).loss.item())
                    if has_diverged(losses):
                        break
        is_main = processes.is_main

    # suggest
    rates, smoothed = rates[: len(losses)], smooth(losses)
    suggestion = suggest(rates, smoothed, run.collapse.chance if run.collapse else math.inf)
    if is_main:
        record = {"lr": rates, "loss": losses, "smoothed_loss": smoothed, "diverged": has_diverged(losses)}
        finite = {name: [v if math.isfinite(v) else None for v in record[name]] for name in ("loss", "smoothed_loss")}
        write_json(
            output.with_suffix(".json"), record | finite | {"suggestion": vars(suggestion) if suggestion else None}
        )
        marks = {f"suggestion {suggestion.tenth:.1e}": suggestion.tenth} if suggestion else {}
        draw_loss_curve(output, rates, losses, smoothed, marks)
        describe(suggestion, diverged=has_diverged(losses), max_lr=max_lr)
        log.info(f"wrote {output} and {output.with_suffix('.json')}")
    return suggestion


def _without_outputs(options: Options, max_lr: float) -> Options:
    """Return the options without evaluations, trackers and warmup."""
    return replace(
        options,
        run=replace(options.run, report_to="none", overwrite=False),
        train=replace(options.train, lr=max_lr, warmup=None),
        evaluation=replace(options.evaluation, zero_shot_eval=None, protocols=("none",)),
    )


def load_batches(loader: Loader) -> Generator[TrainBatch]:
    """Yield this process's batches, epoch after epoch."""
    epoch = 0
    while True:
        yield from loader.epoch(epoch, 0)
        epoch += 1


def smooth(losses: list[float]) -> list[float]:
    """Return the exponential moving average of the losses so far, without a bias to the start (as Adam's moments)."""
    mean, smoothed = 0.0, []
    for step, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smoothed.append(mean / (1 - SMOOTHING**step))
    return smoothed


def has_diverged(losses: list[float]) -> bool:
    """Whether the last smoothed loss is not finite, or DIVERGED times the lowest one."""
    smoothed = smooth(losses)
    return not math.isfinite(smoothed[-1]) or smoothed[-1] > DIVERGED * min(smoothed)


def suggest(rates: list[float], smoothed: list[float], chance: float = math.inf) -> Suggestion | None:
    """Suggest a learning rate from the smoothed loss at each rate; None if the loss hardly fell.

    chance: the loss of equal features. A high rate may make them equal, and the loss falls to it, not below.
    """
    losses = np.array(smoothed)
    losses[~np.isfinite(losses)] = np.inf
    lowest = int(losses.argmin())
    if lowest < 2 or losses[lowest] > (1 - LEAST_FALL) * min(losses[0], chance):
        return None
    slopes = np.gradient(losses[: lowest + 1], np.log(rates[: lowest + 1]))
    return Suggestion(rates[lowest], rates[lowest] / 10, rates[int(slopes.argmin())])


def describe(suggestion: Suggestion | None, *, diverged: bool, max_lr: float) -> None:
    """Log the suggestion, and what it rests on."""
    if suggestion is None:
        log.warning(
            "the loss did not fall, or only to that of equal features: no suggestion; look at the curve, and try a "
            "lower --min_lr or more --steps"
        )
        return
    log.info(
        f"--lr {suggestion.tenth:.1e} is a tenth of the rate with the lowest loss ({suggestion.lowest:.1e}); the loss "
        f"falls fastest at {suggestion.steepest:.1e}"
    )
    if not diverged and suggestion.lowest > max_lr / 2:
        log.warning(f"the loss was still falling at --max_lr {max_lr:g}; a higher one may give a higher suggestion")
