"""Averages of the trainable weights over the steps of a run: exponential (--ema) and equal (--swa_start)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.options import TrainOptions

EMA, SWA = "ema", "swa"
WARMUP_POWER = 2 / 3  # timm's ModelEmaV3: 0.99 is reached after 1,000 steps, 0.999 after 31,600


class WeightAverage:
    """A running average of the trainable float32 weights of a model.

    Frozen weights never change, and buffers (running statistics of batch normalisation) are those of the model. It
    takes no memory before the first update.

    Args:
        model: the model with the master weights.
        share: the share of the current weights in the average, given the number of earlier updates; 1 for the first.
    """

    def __init__(self, model: nn.Module, share: Callable[[int], float]):
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._names, self._weights = list(trainable), list(trainable.values())
        self._share = share
        self._averages: list[Tensor] = []
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights: one fused kernel for all of them, without waiting for the device."""
        if not self._averages:
            self._averages = [weight.detach().clone() for weight in self._weights]
        else:
            torch._foreach_lerp_(
                self._averages, [weight.detach() for weight in self._weights], self._share(self.updates)
            )
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Exchange the weights of the model for their average inside the block; nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for number, weight in enumerate(self._weights):
            weight.data, self._averages[number] = self._averages[number], weight.data

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates, and the averages by name."""
        return {"updates": self.updates, "weights": dict(zip(self._names, self._averages))}

    def load_state_dict(self, state: dict[str, Any], source: str) -> None:
        """Restore a `state_dict`. Raises UserError, naming `source`, if it has other names, shapes or dtypes."""
        stored = state["weights"]
        fits = list(stored) == (self._names if state["updates"] else []) and all(
            stored[name].shape == weight.shape and stored[name].dtype == weight.dtype
            for name, weight in zip(stored, self._weights)
        )
        if not fits:
            raise UserError(
                f"{source}: its averaged weights do not fit the trainable parameters; add --reset_optimizer"
            )
        # in the memory format of the weights, as in an uninterrupted run
        self._averages = [torch.empty_like(weight).copy_(stored[name]) for name, weight in zip(stored, self._weights)]
        self._averages = [average.detach() for average in self._averages]
        self.updates = state["updates"]


def ema_share(decay: float) -> Callable[[int], float]:
    """The share of the current weights in an exponential average: 1 - min(decay, 1 - (1 + updates)^(-2/3)).

    The warm-up of the decay is that of timm's ModelEmaV3: the average forgets the initial weights.
    """
    return lambda updates: 1 - min(decay, 1 - (1 + updates) ** -WARMUP_POWER)


def swa_share(updates: int) -> float:
    """The share of the current weights in the mean of all updates (Izmailov et al. 2018, arXiv:1803.05407)."""
    return 1 / (1 + updates)


def make_averages(model: nn.Module, options: TrainOptions) -> dict[str, WeightAverage]:
    """Make the averages of --ema and --swa_start; empty without them.

    Logs a warning for --swa_start with trainable batch normalisation, whose statistics would have to be computed again
    for the averaged weights.
    """
    averages = {}
    if options.ema is not None:
        averages[EMA] = WeightAverage(model, ema_share(options.ema))
    if options.swa_start is not None:
        if any(isinstance(m, _BatchNorm) and any(p.requires_grad for p in m.parameters()) for m in model.modules()):
            log.warning(
                "--swa_start averages weights, but not the statistics of batch normalisation: the average has those of "
                "the last step, which may cost recall"
            )
        averages[SWA] = WeightAverage(model, swa_share)
    return averages
