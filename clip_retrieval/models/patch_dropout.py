"""Patch dropout (FLIP, Li et al. 2023, arXiv:2212.00794): the image tower sees random patches in training."""

from __future__ import annotations

from open_clip.transformer import VisionTransformer
from timm.layers import PatchDropout
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

from clip_retrieval.errors import UserError
from clip_retrieval.models.model_config import ClipModule


def set_patch_dropout(visual: ClipModule, rate: float) -> None:
    """Drop this share of the patches of each image in training, after the position embeddings.

    timm's layer draws on the device; open_clip's own draws on the CPU, and the GPU waits. The config of the model, and
    so its checkpoints, stay the same. Raises UserError if the tower is not a ViT.
    """
    trunk = getattr(visual, "trunk", None)
    if isinstance(visual, VisionTransformer):
        visual.patch_dropout = PatchDropout(rate, num_prefix_tokens=1).train(visual.training)
    elif isinstance(trunk, TimmVisionTransformer):
        trunk.patch_drop = PatchDropout(rate, num_prefix_tokens=trunk.num_prefix_tokens).train(visual.training)
    else:
        kind = type(visual if trunk is None else trunk).__name__
        raise UserError(f"--patch_dropout: this model's image tower ({kind}) does not support it; drop it")
