"""Locate the projections of the two towers into the shared space."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from clip_retrieval.models.model_config import ClipModule
from clip_retrieval.models.simple_clip_model import DistilBertTower, TorchvisionTower

HUGGING_FACE = (HFTextEncoder, DistilBertTower)
"""Text towers of transformers: they mask padding and have their projection in `proj`."""


def text_part(clip: ClipModule) -> ClipModule:
    """Return the module that holds the text tower's parts: `clip.text` of a CustomTextCLIP, or a CLIP itself."""
    return getattr(clip, "text", clip)


def embedding_dim(clip: ClipModule) -> int:
    """Return the width of the features."""
    text = text_part(clip)
    if isinstance(text, HUGGING_FACE):
        return text.output_dim
    projection = text.text_projection
    if projection is None:
        return text.ln_final.weight.shape[0]
    return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]


@dataclass(frozen=True)
class Projection:
    """Location of a tower's projection into the shared space: a parameter, a module, or missing."""

    owner: ClipModule
    name: str

    @property
    def value(self) -> nn.Module | nn.Parameter | None:
        return getattr(self.owner, self.name, None)

    def parameters(self) -> list[nn.Parameter]:
        if isinstance(self.value, nn.Module):
            return list(self.value.parameters())
        return [] if self.value is None else [self.value]


def vision_projection(clip: ClipModule) -> Projection:
    """Locate the image projection: ViT's `proj`, a ResNet's `attnpool.c_proj`, torchvision's `head`, or timm's."""
    visual = clip.visual
    if isinstance(visual, TimmModel):
        return _timm_projection(visual)
    if isinstance(visual, TorchvisionTower):
        return Projection(visual, "head")
    if hasattr(visual, "attnpool"):
        return Projection(visual.attnpool, "c_proj")
    return Projection(visual, "proj")


def _timm_projection(visual: TimmModel) -> Projection:
    """Locate a timm tower's projection: open_clip's `head`, its last layer behind a pooling, or timm's classifier."""
    layers: ClipModule = dict(visual.head.named_children())
    if "pool" in layers:
        behind = next((name for name in ("proj", "mlp") if name in layers), None)
        return Projection(visual.head, behind) if behind else Projection(layers["pool"], "proj")
    classifier = visual.trunk.default_cfg.get("classifier")
    if not any(True for _ in visual.head.parameters()) and isinstance(classifier, str):
        owner, _, name = classifier.rpartition(".")
        own = Projection(visual.trunk.get_submodule(owner), name)
        if own.parameters():
            return own
    return Projection(visual, "head")


def text_projection(clip: ClipModule) -> Projection:
    """Locate the text projection: `text_projection`, or a Hugging Face tower's `proj`."""
    text = text_part(clip)
    return Projection(text, "proj" if isinstance(text, HUGGING_FACE) else "text_projection")


@contextmanager
def without_projection(projection: Projection) -> Iterator[None]:
    """Remove the projection inside the block, so that the tower returns its pooled output."""
    value = projection.value
    if value is None:
        yield
        return
    replacement: nn.Module | None = None
    if projection.name == "c_proj" and isinstance(value, nn.Linear):
        # the attention before it reads weight and bias, so it needs both
        replacement = nn.Linear(value.in_features, value.in_features).to(value.weight)
        nn.init.eye_(replacement.weight)
        nn.init.zeros_(replacement.bias)
    elif projection.name != "text_projection" and isinstance(value, nn.Module):
        replacement = nn.Identity()
    setattr(projection.owner, projection.name, replacement)
    try:
        yield
    finally:
        setattr(projection.owner, projection.name, value)


def project(projection: Projection, pooled: Tensor) -> Tensor:
    """Project a tower's pooled output (n, width) to (n, dim); without a projection they are the same."""
    value = projection.value
    if value is None:
        return pooled
    return value(pooled) if isinstance(value, nn.Module) else pooled @ value
