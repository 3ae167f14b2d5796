"""The learning rate over a run."""

from __future__ import annotations

import math


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Steps of warmup: `warmup` itself, or that fraction of the run if it is below 1; no longer than the run."""
    steps = round(warmup * total_steps) if warmup < 1 else round(warmup)
    return min(steps, total_steps)


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of step 0, 1, ...: a linear warmup to `peak`, then a cosine that reaches 0 at `total_steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
