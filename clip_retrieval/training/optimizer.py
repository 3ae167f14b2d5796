"""AdamW, Lion or Muon, with weight decay on weight matrices only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import Lion
from torch import nn

from clip_retrieval.errors import UserError
from clip_retrieval.models.layers import Place, place_parameters
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import TrainOptions
from clip_retrieval.training.muon import MuonWithAdamW, hidden_matrices

# Position and class embeddings in open_clip, transformers and timm.
NOT_DECAYED: tuple[str, ...] = ("positional_embedding", "class_embedding", "cls_emb", "position_embeddings")
NOT_DECAYED += ("pos_embed", "cls_token", "reg_token")
BETA2 = {"adamw": 0.98, "lion": 0.99, "muon": 0.98}
"""Default of --beta2."""


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    scales: Mapping[str, float] | None = None,
    matrices: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters into groups, with and without weight decay, for each learning rate.

    No weight decay applies to parameters with fewer than two dimensions (biases, normalisation layers, LayerScale, the
    logit scale and bias) and to position and class embeddings.

    scales: factors of the learning rate, by parameter name; 1 for other parameters.
    matrices: parameters that get groups of their own, with the number of matrices in each as `parts`.
    """
    matrices = matrices or {}
    groups: dict[tuple[float, bool, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        exempt = parameter.ndim < 2 or parts[-1].endswith("bias") or any(part in NOT_DECAYED for part in parts)
        groups.setdefault(((scales or {}).get(name, 1.0), exempt, name in matrices), {})[name] = parameter
    return [
        {
            "params": list(parameters.values()),
            "names": list(parameters),
            "weight_decay": 0.0 if exempt else weight_decay,
            "lr_scale": scale,
            **({"parts": [matrices[name] for name in parameters]} if are_matrices else {}),
        }
        for (scale, exempt, are_matrices), parameters in sorted(groups.items(), key=lambda item: item[0][1])
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


def make_optimizer(model: RetrievalModel, options: TrainOptions, device: torch.device) -> torch.optim.Optimizer:
    """Make the optimizer over the trainable parameters; AdamW is fused on CUDA and CPU.

    Lion (Chen et al. 2023, arXiv:2302.06675) is timm's. Raises UserError if Muon has no matrix to update.
    """
    matrices = hidden_matrices(model.clip) if options.optimizer == "muon" else {}
    matrices = {f"clip.{name}": parts for name, parts in matrices.items()}
    groups = parameter_groups(model, options.weight_decay, rate_scales(model, options), matrices)
    groups = [group | {"lr": options.lr * group["lr_scale"]} for group in groups]
    beta2 = options.beta2 if options.beta2 is not None else BETA2[options.optimizer]
    if options.optimizer == "lion":
        return Lion(groups, lr=options.lr, betas=(options.beta1, beta2))
    adamw: dict[str, Any] = {
        "lr": options.lr,
        "betas": (options.beta1, beta2),
        "eps": options.eps,
        "fused": device.type in ("cuda", "cpu"),
    }
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, **adamw)
    if not any("parts" in group for group in groups):
        raise UserError(
            "--optimizer muon updates weight matrices of linear layers, and --trainable "
            f"{options.trainable} trains none; use adamw"
        )
    return MuonWithAdamW(groups, **adamw)


def moment_names(optimizer: torch.optim.Optimizer) -> list[tuple[str, ...]]:
    """Return the names of the tensors in the state of each parameter."""
    others = ("exp_avg",) if isinstance(optimizer, Lion) else ("exp_avg", "exp_avg_sq", "step")
    return [
        ("momentum_buffer",) if "parts" in group else others
        for group in optimizer.param_groups
        for _ in group["params"]
    ]
