"""AdamW, with weight decay on weight matrices only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from clip_retrieval.models.layers import Place, place_parameters
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import TrainOptions

# Position and class embeddings in open_clip, transformers and timm.
NOT_DECAYED: tuple[str, ...] = ("positional_embedding", "class_embedding", "cls_emb", "position_embeddings")
NOT_DECAYED += ("pos_embed", "cls_token", "reg_token")


def parameter_groups(
    model: nn.Module, weight_decay: float, scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Split the trainable parameters into groups, with and without weight decay, for each learning rate.

    No weight decay applies to parameters with fewer than two dimensions (biases, normalisation layers, LayerScale, the
    logit scale and bias) and to position and class embeddings.

    scales: factors of the learning rate, by parameter name; 1 for other parameters.
    """
    groups: dict[tuple[float, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        exempt = parameter.ndim < 2 or parts[-1].endswith("bias") or any(part in NOT_DECAYED for part in parts)
        groups.setdefault(((scales or {}).get(name, 1.0), exempt), {})[name] = parameter
    return [
        {
            "params": list(parameters.values()),
            "names": list(parameters),
            "weight_decay": 0.0 if exempt else weight_decay,
            "lr_scale": scale,
        }
        for (scale, exempt), parameters in sorted(groups.items(), key=lambda item: item[0][1])
    ]


def rate_scales(model: RetrievalModel, options: TrainOptions) -> dict[str, float]:
    """Return the learning rate of each parameter as a factor of `lr`; empty if all are 1.

    The factor is layer_decay to the power of the layer's distance from the layers behind the last block, as in BEiT
    (arXiv:2106.08254): decay^1 in the last block, decay^(blocks + 1) for embeddings. It multiplies the part's own rate.
    """
    own = {"image": options.lr_image, "text": options.lr_text, "head": options.lr_head}
    if options.layer_decay is None and not any(own.values()):
        return {}
    factors = {part: (rate or options.lr) / options.lr for part, rate in own.items()}
    places = {f"clip.{name}": place for name, place in place_parameters(model.clip).items()}
    head = Place("head", 0)  # the adaptor's
    found = {}
    for name, _ in model.named_parameters():
        part, depth = places.get(name, head)
        found[name] = factors[part] * (options.layer_decay or 1.0) ** depth
    return found


def make_optimizer(model: RetrievalModel, options: TrainOptions, device: torch.device) -> torch.optim.AdamW:
    """Make AdamW over the trainable parameters, fused on CUDA and CPU."""
    groups = parameter_groups(model, options.weight_decay, rate_scales(model, options))
    return torch.optim.AdamW(
        [group | {"lr": options.lr * group["lr_scale"]} for group in groups],
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        fused=device.type in ("cuda", "cpu"),
    )
