"""AdamW, with weight decay where it belongs."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torchvision.ops import FrozenBatchNorm2d

from clip_retrieval.options import TrainOptions

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase, FrozenBatchNorm2d)
NOT_DECAYED = ("logit_scale", "logit_bias", "positional_embedding", "class_embedding", "position_embeddings", "cls_emb")
NOT_DECAYED_TIMM = ("pos_embed", "cls_token", "reg_token")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The parameters that learn, in two groups: with decay, and without.

    Without: biases, every parameter of a normalisation layer (known by its type, not its name), the logit scale and
    bias, position and class embeddings.
    """
    of_norms = {p for module in model.modules() if isinstance(module, NORMS) for p in module.parameters(recurse=False)}
    decayed, not_decayed = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        exempt = (
            parameter in of_norms
            or parts[-1].endswith("bias")
            or any(part in NOT_DECAYED + NOT_DECAYED_TIMM for part in parts)
        )
        (not_decayed if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, options: TrainOptions, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the parameters that learn; one fused kernel on CUDA."""
    return torch.optim.AdamW(
        parameter_groups(model, options.weight_decay),
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        fused=device.type in ("cuda", "cpu"),
    )
