"""The learning rate of each step, and the steps at which a run logs, saves and evaluates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clip_retrieval.options import Options

DEFAULT_WARMUP = 500  # steps
DECAY_FRACTION = 0.2  # of the run; Hägele et al. 2024, arXiv:2405.18392


def warmup_steps(warmup: float | None, total_steps: int) -> int:
    """Return the number of warmup steps: `warmup`, or that fraction of the run if below 1; at most `total_steps`.

    None is the default: DEFAULT_WARMUP, but at most a tenth of the run.
    """
    if warmup is None:
        return min(DEFAULT_WARMUP, total_steps // 10)
    steps = round(warmup * total_steps) if warmup < 1 else round(warmup)
    return min(steps, total_steps)


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    schedule: str = "cosine",
    decay_fraction: float | None = None,
) -> float:
    """Return the rate after `step` complete steps.

    A linear warmup leads to `peak`. Then the rate falls to 0 at `total_steps`, as a "cosine" or "linear"; or is
    "constant"; or with "wsd" (warmup, stable, decay; Hu et al. 2024, arXiv:2404.06395) stays at `peak` and falls
    linearly in the last `decay_fraction` of the run (default: DECAY_FRACTION).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    start = warmup_steps
    if schedule == "wsd":
        start = max(start, total_steps - round((decay_fraction or DECAY_FRACTION) * total_steps))
    progress = min(1.0, max(0, step - start) / max(1, total_steps - start))
    return peak * (0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress)


@dataclass(frozen=True)
class Schedule:
    """The steps at which a run logs, saves and evaluates. Steps count from 1.

    Attributes:
        total_steps: length of the run.
        steps_per_epoch: length of an epoch.
        log_every: steps between log lines.
        save_every: steps between saves of last.pt; None: only at milestones.
        eval_every: epochs between evaluations on the val split; 0: only at the end.
        eval_steps: steps between additional evaluations; 0: none.
        zero_shot_steps: steps between zero-shot evaluations; 0: at those on the val split.
        keep_every: epochs between numbered checkpoints; 0: none.
        keep_steps: steps between numbered checkpoints; 0: none.
        swa_start: epoch from whose end on weights are averaged; None: never.
        small_steps: first steps, whose images are reduced.
    """

    total_steps: int
    steps_per_epoch: int
    log_every: int = 20
    save_every: int | None = None
    eval_every: int = 1
    eval_steps: int = 0
    zero_shot_steps: int = 0
    keep_every: int = 0
    keep_steps: int = 0
    swa_start: int | None = None
    small_steps: int = 0

    @classmethod
    def from_options(cls, options: Options, steps_per_epoch: int) -> Schedule:
        """Make the schedule from the options of a run."""
        total_steps = options.train.max_steps or options.train.epochs * steps_per_epoch
        small = options.train.start_image_size_until if options.train.start_image_size else 0
        return cls(
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            log_every=options.run.display,
            save_every=options.run.save_every,
            eval_every=options.evaluation.eval_every,
            eval_steps=options.evaluation.eval_steps,
            zero_shot_steps=options.evaluation.zero_shot_steps,
            keep_every=options.run.keep_every,
            keep_steps=options.run.keep_steps,
            swa_start=options.train.swa_start,
            small_steps=round(small * total_steps),
        )

    def is_last(self, step: int) -> bool:
        """Whether the run ends with this step."""
        return step == self.total_steps

    def is_milestone(self, step: int) -> bool:
        """Whether the run saves, and perhaps evaluates, after this step: at the end of an epoch or an interval."""
        intervals = (self.steps_per_epoch, self.eval_steps, self.zero_shot_steps, self.keep_steps)
        return self.is_last(step) or any(_is_multiple(step, interval) for interval in intervals)

    def logs(self, step: int) -> bool:
        """Whether a log line is due."""
        return self.is_last(step) or _is_multiple(step, self.log_every)

    def saves(self, step: int) -> bool:
        """Whether last.pt is saved between two milestones."""
        return _is_multiple(step, self.save_every)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation on the val split is due."""
        return self.is_last(step) or self._ends_epochs(step, self.eval_every) or _is_multiple(step, self.eval_steps)

    def evaluates_zero_shot(self, step: int) -> bool:
        """Whether a zero-shot evaluation is due."""
        return _is_multiple(step, self.zero_shot_steps) if self.zero_shot_steps else self.evaluates(step)

    def averages(self, step: int) -> bool:
        """Whether the weights enter the average of --swa_start."""
        return (
            self.swa_start is not None and step >= self.swa_start * self.steps_per_epoch and self._ends_epochs(step, 1)
        )

    def keeps_epoch(self, step: int) -> bool:
        """Whether a checkpoint numbered by its epoch is due."""
        return self._ends_epochs(step, self.keep_every)

    def keeps_step(self, step: int) -> bool:
        """Whether a checkpoint numbered by its step is due."""
        return _is_multiple(step, self.keep_steps)

    def _ends_epochs(self, step: int, epochs: int) -> bool:
        return _is_multiple(step, epochs * self.steps_per_epoch)


def _is_multiple(step: int, interval: int | None) -> bool:
    return bool(interval and step % interval == 0)
