"""AdamW, with weight decay on weight matrices only."""

from __future__ import annotations

import torch
from torch import nn

from clip_retrieval.options import TrainOptions

# Position and class embeddings in open_clip, transformers and timm.
NOT_DECAYED: tuple[str, ...] = ("positional_embedding", "class_embedding", "cls_emb", "position_embeddings")
NOT_DECAYED += ("pos_embed", "cls_token", "reg_token")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split the trainable parameters into two groups, with and without weight decay.

    No weight decay applies to parameters with fewer than two dimensions (biases, normalisation layers, LayerScale, the
    logit scale and bias) and to position and class embeddings.
    """
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        exempt = parameter.ndim < 2 or parts[-1].endswith("bias") or any(part in NOT_DECAYED for part in parts)
        (not_decayed if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, options: TrainOptions, device: torch.device) -> torch.optim.AdamW:
    """Make AdamW over the trainable parameters, fused on CUDA and CPU."""
    return torch.optim.AdamW(
        parameter_groups(model, options.weight_decay),
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        fused=device.type in ("cuda", "cpu"),
    )
