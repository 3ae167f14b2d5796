"""The losses: pure functions of features, positives and, where they have one, a temperature."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from clip_retrieval.distributed import Processes
from clip_retrieval.losses.infonce import infonce
from clip_retrieval.losses.margin import margin_pairwise
from clip_retrieval.losses.siglip import siglip
from clip_retrieval.options import LossOptions

Loss = Callable[..., Tensor]


def make_loss(options: LossOptions, processes: Processes) -> Loss:
    """The chosen loss, as a function of (image_features, text_features, positives, logit_scale, logit_bias or nothing).

    Each process gives the features of its own images and of everybody's captions, and gets its part of the loss.
    """
    if options.loss == "siglip":
        return lambda image, text, positives, scale, bias: siglip(image, text, positives, scale, bias, processes)
    if options.loss == "margin":
        return lambda image, text, positives, *_: margin_pairwise(image, text, positives, options.margin, processes)
    return lambda image, text, positives, scale, *_: infonce(image, text, positives, scale, processes)
