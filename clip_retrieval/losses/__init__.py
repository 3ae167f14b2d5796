"""The losses by name: pure functions of features and positives, with logit scale, bias and margin as needed.

To add a loss, write its function in a new file and add a row to LOSSES; a new hyperparameter also needs an option and
a line in `make_loss`. This file must not import torch, because the command line reads the choices of --loss from it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from clip_retrieval.distributed import Processes
    from clip_retrieval.options import LossOptions


@dataclass(frozen=True)
class Loss:
    """A row of LOSSES.

    Attributes:
        function: `file.function`, in this folder.
        arguments: the arguments besides features, positives and processes: logit_scale (the factor, not its
            logarithm), logit_bias, or options of the loss.
        margin: the default of --margin.
        learns_scale: the logit scale is trainable.
        learns_bias: the logit bias is trainable; it is added to a model without one.
        highest_scale: the logit scale is clamped to [1, highest_scale] after each step, so the parameter, its
            logarithm, to [0, ln highest_scale]; None: not clamped.
        detects_collapse: the loss is ln(batch_size) if all features are equal; see `training.collapse`.
    """

    function: str
    arguments: tuple[str, ...]
    margin: float | None = None
    learns_scale: bool = True
    learns_bias: bool = False
    highest_scale: float | None = None
    detects_collapse: bool = False


LOSSES = {
    "infonce": Loss(
        "infonce.infonce",
        ("logit_scale", "label_smoothing", "i2t_weight"),
        highest_scale=100.0,
        detects_collapse=True,
    ),
    "siglip": Loss("siglip.siglip", ("logit_scale", "logit_bias"), learns_bias=True),
    "margin": Loss("margin.margin_pairwise", ("margin",), margin=0.1, learns_scale=False),
    "triplet": Loss("triplet.triplet", ("margin", "i2t_weight"), margin=0.2, learns_scale=False),
}

DISTILLATIONS = ("relational", "feature")
"""The kinds of distillation, see `losses.distillation`."""


def make_loss(options: LossOptions, processes: Processes) -> Callable[..., Tensor]:
    """Return the chosen loss as a function of (image_features, text_features, positives, logit_scale, logit_bias=None).

    Each process passes the features of its own images and of all captions; the result is its part of the loss.
    """
    row = LOSSES[options.loss]
    file, function_name = row.function.split(".")
    function = getattr(importlib.import_module(f"clip_retrieval.losses.{file}"), function_name)

    def loss(images: Tensor, texts: Tensor, positives: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        margin = row.margin if options.margin is None else options.margin
        values = vars(options) | {"logit_scale": scale, "logit_bias": bias, "margin": margin}
        arguments = {argument: values[argument] for argument in row.arguments}
        return function(images, texts, positives, **arguments, processes=processes)

    return loss
