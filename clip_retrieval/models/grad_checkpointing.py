"""Gradient checkpointing: recompute activations in the backward pass instead of keeping them."""

from __future__ import annotations

from contextlib import suppress

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import Bottleneck, ModifiedResNet
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clip_retrieval.log import log
from clip_retrieval.models.libraries import quiet
from clip_retrieval.models.model_config import ClipModule
from clip_retrieval.models.projection import text_part

FLAGS = ("grad_checkpointing", "gradient_checkpointing")
"""Attributes that open_clip's, timm's and transformers' modules set if they recompute."""


def enable_grad_checkpointing(clip: ClipModule) -> None:
    """Enable gradient checkpointing in both towers; a tower without it gets a warning.

    A block that runs twice would update its batch statistics twice: run the backward pass under
    `batch_norm.freeze_statistics`.
    """
    for tower, name in ((clip.visual, "image"), (text_part(clip), "text")):
        if isinstance(tower, ModifiedResNet):  # open_clip has none for it
            for module in tower.modules():
                if type(module) is Bottleneck:
                    module.__class__ = _RecomputedBottleneck
        elif tower is clip:
            clip.transformer.grad_checkpointing = True
        elif isinstance(tower, HFTextEncoder):  # open_clip's version uses the older reentrant checkpoints
            tower.transformer.config.use_cache = False  # else transformers warns of it in the first step
            with quiet(), suppress(ValueError):  # the tower does not support it
                tower.transformer.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            with quiet():
                tower.set_grad_checkpointing()
        if not any(getattr(module, flag, False) for module in tower.modules() for flag in FLAGS):
            kind = type(getattr(tower, "trunk", getattr(tower, "transformer", tower))).__name__
            log.warning(f"--grad_checkpointing has no effect on this model's {name} tower ({kind})")


class _RecomputedBottleneck(Bottleneck):
    grad_checkpointing = True

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        return checkpoint(super().forward, x, use_reentrant=False)
