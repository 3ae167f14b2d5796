"""The losses: pure functions of features, positives and, where they have one, a temperature."""

from __future__ import annotations

from collections.abc import Callable

import torch

from clip_retrieval.losses.infonce import infonce
from clip_retrieval.losses.margin import margin_pairwise
from clip_retrieval.losses.siglip import siglip
from clip_retrieval.options import LossOptions

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def make_loss(options: LossOptions) -> Loss:
    """The chosen loss, as a function of (image_features, text_features, positives, logit_scale, logit_bias)."""
    if options.loss == "siglip":
        return siglip
    if options.loss == "margin":
        return lambda image, text, positives, scale, bias: margin_pairwise(image, text, positives, options.margin)
    return lambda image, text, positives, scale, bias: infonce(image, text, positives, scale)
