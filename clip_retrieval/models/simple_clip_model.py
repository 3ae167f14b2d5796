"""simple-clip's model: a CNN of torchvision for images, DistilBERT for captions, a projection head on each.

https://github.com/filipbasara0/simple-clip. The parts have the names and the calls of open_clip's CustomTextCLIP, so
that everything else takes the one for the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision import models
from torchvision.models.efficientnet import FusedMBConv, MBConv
from torchvision.models.resnet import BasicBlock, Bottleneck

from clip_retrieval.models.batch_norm import freeze_statistics
from clip_retrieval.models.hub import quiet

CLASSIFIERS = {"resnet18": "fc", "resnet50": "fc", "efficientnet_v2_s": "classifier"}
"""torchvision's models that may be the image tower, and what each calls the layers behind its pooling."""

RESIDUAL_BLOCKS = (BasicBlock, Bottleneck, FusedMBConv, MBConv)
VISION_KEYS = {"torchvision_model_name", "image_size"}
TEXT_KEYS = {"hf_config", "hf_model_name", "hf_tokenizer_name", "context_length", "vocab", "proj_type"}
PROJECTIONS = ("mlp", "none")


class SimpleCLIP(nn.Module):
    """Both towers and the temperature, made of a model config.

    Args:
        embed_dim: width of the features.
        vision_cfg: `torchvision_model_name`; `image_size` is for the preprocessing alone, the tower takes any.
        text_cfg: `hf_config`, DistilBERT's own; `proj_type`, "mlp" or "none" for a tower without a projection head,
            as wide as the features; the rest is for the tokenizer.
        init_logit_scale: log of the temperature's inverse at the start.
        init_logit_bias: the bias at the start, or None for a model without one.

    Raises:
        ValueError: a config that is not this model's.
    """

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: dict[str, Any],
        text_cfg: dict[str, Any],
        init_logit_scale: float = math.log(1 / 0.07),
        init_logit_bias: float | None = None,
    ):
        super().__init__()
        if unknown := (vision_cfg.keys() - VISION_KEYS) | (text_cfg.keys() - TEXT_KEYS):
            raise ValueError(f"it has {', '.join(sorted(unknown))}, which a tower of torchvision or DistilBERT has not")
        if text_cfg.get("hf_config", {}).get("model_type") != "distilbert":
            raise ValueError("beside a torchvision_model_name its text_cfg needs an hf_config of model_type distilbert")
        self.visual = TorchvisionTower(vision_cfg["torchvision_model_name"], embed_dim)
        if (proj_type := text_cfg.get("proj_type", PROJECTIONS[0])) not in PROJECTIONS:
            raise ValueError(f"its proj_type is {proj_type}, none of {', '.join(PROJECTIONS)}")
        self.text = DistilBertTower(text_cfg["hf_config"], embed_dim, has_head=proj_type == "mlp")
        positions = self.text.transformer.config.max_position_embeddings
        if text_cfg.get("context_length", 0) > positions:
            raise ValueError(f"its context_length is more than the {positions} positions of its text tower")
        self.logit_scale = nn.Parameter(torch.tensor(float(init_logit_scale)))
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.tensor(float(init_logit_bias)))

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """(n, embed_dim) of float (n, 3, height, width)."""
        features = self.visual(images)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """(n, embed_dim) of int64 (n, length)."""
        features = self.text(tokens)
        return F.normalize(features, dim=-1) if normalize else features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations inside the blocks of the towers: compute them again in the backward pass."""
        self.visual.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)


class TorchvisionTower(nn.Module):
    """A CNN of torchvision up to its global average pooling, and the projection head.

    Args:
        name: one of CLASSIFIERS. `trunk` is torchvision's module with random weights, so that a state dict of
            torchvision's fits it, but for the classifier.
        output_dim: width of the features.
    """

    def __init__(self, name: str, output_dim: int):
        super().__init__()
        if name not in CLASSIFIERS:
            raise ValueError(f"its torchvision_model_name is {name}, none of {', '.join(CLASSIFIERS)}")
        self.trunk = getattr(models, name)(weights=None)
        *_, classifier = (m for m in getattr(self.trunk, CLASSIFIERS[name]).modules() if isinstance(m, nn.Linear))
        setattr(self.trunk, CLASSIFIERS[name], nn.Identity())
        self.head = make_projection_head(classifier.in_features, output_dim)
        self.grad_checkpointing = False

    def forward(self, images: Tensor) -> Tensor:
        """(n, output_dim) of float (n, 3, height, width)."""
        recomputes = self.grad_checkpointing and torch.is_grad_enabled()
        return self.head(self._pooled_recomputing(images) if recomputes else self.trunk(images))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def _pooled_recomputing(self, x: Tensor) -> Tensor:
        # A trunk's forward is its parts one after the other, and the pooled 1 x 1 flattened.
        for part in _parts(self.trunk):
            x = _recomputed(part, x) if isinstance(part, RESIDUAL_BLOCKS) else part(x)
        return x.flatten(1)


class DistilBertTower(nn.Module):
    """DistilBERT, the mean of its last hidden states over the tokens that are no padding, and the projection head.

    simple-clip averages over the padding as well, so that a caption's features depend on the captions beside it; on
    captions of one length the two are the same.

    Args:
        hf_config: DistilBERT's config (vocab_size, dim, n_layers, ...), from which it is built with random weights.
        output_dim: width of the features.
        has_head: project them; otherwise they are as wide as DistilBERT.
    """

    def __init__(self, hf_config: dict[str, Any], output_dim: int, *, has_head: bool = True):
        super().__init__()
        from transformers import DistilBertConfig, DistilBertModel

        config = DistilBertConfig.from_dict(hf_config)
        self.transformer = DistilBertModel(config)
        if not has_head and config.dim != output_dim:
            raise ValueError(f"without a head its features have {config.dim} dimensions, not {output_dim}")
        self.proj = make_projection_head(config.dim, output_dim) if has_head else nn.Identity()
        self.output_dim = output_dim
        self.vocab_size = config.vocab_size

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, output_dim) of int64 (n, length), padded to any length."""
        mask = tokens != self.transformer.config.pad_token_id
        hidden = self.transformer(tokens, attention_mask=mask).last_hidden_state
        total = (hidden * mask[..., None]).sum(dim=1)
        return self.proj(total / mask.sum(dim=1, keepdim=True).clamp(min=1))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        with quiet():  # transformers 5 knows them by other names as well, and says so
            if enable:
                self.transformer.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                self.transformer.gradient_checkpointing_disable()


def make_projection_head(width: int, output_dim: int) -> nn.Sequential:
    """Two bias-free layers, (n, width) to (n, output_dim)."""
    return nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, output_dim, bias=False))


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that run one after the other in a trunk, its sequences opened."""
    for child in module.children():
        if type(child) is nn.Sequential:
            yield from _parts(child)
        else:
            yield child


def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """`block(x)`, its activations computed again in the backward pass, without a second trace in its statistics."""
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), freeze_statistics(block)))
