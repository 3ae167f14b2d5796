"""simple-clip's model: a torchvision CNN for images, DistilBERT for captions, a projection head on each.

https://github.com/filipbasara0/simple-clip
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from open_clip.model import CustomTextCLIP
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision import models
from torchvision.models.efficientnet import FusedMBConv, MBConv
from torchvision.models.resnet import BasicBlock, Bottleneck

from clip_retrieval.models.libraries import quiet

CLASSIFIERS = {"resnet18": "fc", "resnet50": "fc", "efficientnet_v2_s": "classifier"}
"""torchvision models that may be the image tower, and the attribute of each that holds its classifier."""

RESIDUAL_BLOCKS = (BasicBlock, Bottleneck, FusedMBConv, MBConv)
VISION_KEYS = {"torchvision_model_name", "image_size"}
TEXT_KEYS = {
    "hf_config",
    "hf_model_name",
    "hf_model_pretrained",
    "hf_tokenizer_name",
    "context_length",
    "vocab",
    "proj_type",
}
PROJECTIONS = ("mlp", "none")


class SimpleCLIP(CustomTextCLIP):
    """Both towers and the temperature, built from a model config.

    Args:
        embed_dim: width of the features.
        vision_cfg: `torchvision_model_name`; `image_size` is used only by the preprocessing, the tower takes any size.
        text_cfg: `hf_config`, DistilBERT's own; `proj_type`, "mlp" or "none" (no projection head: DistilBERT is as wide
            as the features); the rest is for the tokenizer.
        init_logit_scale: initial log of the inverse temperature.
        init_logit_bias: initial bias, or None for a model without one.

    Raises:
        ValueError: the config is not this model's.
    """

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: dict[str, Any],
        text_cfg: dict[str, Any],
        init_logit_scale: float = math.log(1 / 0.07),
        init_logit_bias: float | None = None,
    ):
        nn.Module.__init__(self)  # open_clip's would build its own towers
        if unknown := (vision_cfg.keys() - VISION_KEYS) | (text_cfg.keys() - TEXT_KEYS):
            raise ValueError(f"unknown keys for a torchvision or DistilBERT tower: {', '.join(sorted(unknown))}")
        if text_cfg.get("hf_config", {}).get("model_type") != "distilbert":
            raise ValueError("with a torchvision_model_name, text_cfg needs an hf_config of model_type distilbert")
        self.visual = TorchvisionTower(vision_cfg["torchvision_model_name"], embed_dim)
        if (proj_type := text_cfg.get("proj_type", PROJECTIONS[0])) not in PROJECTIONS:
            raise ValueError(f"proj_type is {proj_type}, not one of {', '.join(PROJECTIONS)}")
        self.text = DistilBertTower(text_cfg["hf_config"], embed_dim, has_head=proj_type == "mlp")
        positions = self.text.transformer.config.max_position_embeddings
        if text_cfg.get("context_length", 0) > positions:
            raise ValueError(f"context_length is more than the {positions} positions of the text tower")
        self.logit_scale = nn.Parameter(torch.tensor(float(init_logit_scale)))
        self.logit_bias = None if init_logit_bias is None else nn.Parameter(torch.tensor(float(init_logit_bias)))


class TorchvisionTower(nn.Module):
    """A torchvision CNN up to its global average pooling, and a projection head.

    Args:
        name: one of CLASSIFIERS. `trunk` is torchvision's module, so torchvision's state dicts fit it, except for the
            classifier.
        output_dim: width of the features.
    """

    def __init__(self, name: str, output_dim: int):
        super().__init__()
        if name not in CLASSIFIERS:
            raise ValueError(f"torchvision_model_name is {name}, not one of {', '.join(CLASSIFIERS)}")
        self.trunk = getattr(models, name)(weights=None)
        *_, classifier = (m for m in getattr(self.trunk, CLASSIFIERS[name]).modules() if isinstance(m, nn.Linear))
        setattr(self.trunk, CLASSIFIERS[name], nn.Identity())
        self.head = make_projection_head(classifier.in_features, output_dim)
        self.grad_checkpointing = False

    def forward(self, images: Tensor) -> Tensor:
        """Encode float images (n, 3, height, width) as (n, output_dim)."""
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        return self.head(self._run_checkpointed(images) if recompute else self.trunk(images))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def _run_checkpointed(self, x: Tensor) -> Tensor:
        # A trunk runs its layers one after the other and flattens the pooled 1 x 1.
        for layer in _iterate_layers(self.trunk):
            is_block = isinstance(layer, RESIDUAL_BLOCKS)
            x = checkpoint(layer, x, use_reentrant=False) if is_block else layer(x)
        return x.flatten(1)


class DistilBertTower(nn.Module):
    """DistilBERT, the mean of its last hidden states over all tokens except padding, and a projection head.

    simple-clip averages over the padding as well, so a caption's features depend on the other captions of its batch.
    Both are equal if all captions have the same length.

    Args:
        hf_config: DistilBERT's config (vocab_size, dim, n_layers, ...).
        output_dim: width of the features.
        has_head: whether the features are projected; otherwise they are as wide as DistilBERT.
    """

    def __init__(self, hf_config: dict[str, Any], output_dim: int, *, has_head: bool = True):
        super().__init__()
        from transformers import DistilBertConfig, DistilBertModel

        config: Any = DistilBertConfig.from_dict(hf_config)
        self.transformer = DistilBertModel(config)
        if not has_head and config.dim != output_dim:
            raise ValueError(f"without a head its features have {config.dim} dimensions, not {output_dim}")
        self.proj = make_projection_head(config.dim, output_dim) if has_head else nn.Identity()
        self.output_dim = output_dim
        self.vocab_size = config.vocab_size
        self.pad_token_id: int = config.pad_token_id

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode int64 ids (n, length), padded to any length, as (n, output_dim)."""
        mask = tokens != self.pad_token_id
        hidden = self.transformer(tokens, attention_mask=mask).last_hidden_state
        total = (hidden * mask[..., None]).sum(dim=1)
        return self.proj(total / mask.sum(dim=1, keepdim=True).clamp(min=1))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        with quiet():  # transformers 5 warns about these names
            if enable:
                self.transformer.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                self.transformer.gradient_checkpointing_disable()


def make_projection_head(width: int, output_dim: int) -> nn.Sequential:
    """Make two bias-free layers, (n, width) to (n, output_dim)."""
    return nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, output_dim, bias=False))


def _iterate_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a trunk in order, also those inside nn.Sequential."""
    for child in module.children():
        if type(child) is nn.Sequential:
            yield from _iterate_layers(child)
        else:
            yield child
