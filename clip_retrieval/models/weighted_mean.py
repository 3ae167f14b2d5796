"""Weighted means of state dicts, for interpolation and soups."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clip_retrieval.errors import UserError
from clip_retrieval.models.model_config import State


def weighted_mean(states: Sequence[State], weights: Sequence[float], dtype: torch.dtype | None = None) -> State:
    """Return the sum of weights[i] * states[i], computed in float64, one tensor at a time.

    A state with weight 0 has no effect, so that weights 0 and 1 return the exact tensors. Whole numbers (position ids,
    counts) are those of the last state. `dtype`: of the result (default: that of the last state).
    """
    mean: State = {}
    for name, last in states[-1].items():
        if not last.is_floating_point():
            mean[name] = last
            continue
        total = torch.zeros_like(last, dtype=torch.float64)
        for state, weight in zip(states, weights, strict=True):
            if weight:
                total += weight * state[name].to(last.device, torch.float64)
        mean[name] = total.to(dtype or last.dtype)
    return mean


def check_same_architecture(first: State, other: State, names: tuple[str, str]) -> None:
    """Raise UserError, naming both files, unless the state dicts have the same names and shapes."""
    differing = sorted(first.keys() ^ other.keys())
    differing += [name for name in first if name in other and first[name].shape != other[name].shape]
    if differing:
        shapes = [str(list(state[differing[0]].shape)) if differing[0] in state else "none" for state in (first, other)]
        raise UserError(
            f"{names[0]} and {names[1]} have different architectures ({len(differing):,} tensors differ, such as "
            f"{differing[0]}: {' and '.join(shapes)}); give models finetuned from the same weights"
        )
