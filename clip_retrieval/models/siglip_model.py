"""SigLIP with an image tower of any size. open_clip's configs name one of timm's sizes instead."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
from open_clip.model import CustomTextCLIP
from open_clip.timm_model import TimmModel
from timm.layers import LayerNorm
from torch import nn

TIMM_MODEL = "vit_base_patch16_siglip_224"
"""A ViT with attention pooling; `timm_kwargs` gives its sizes."""

_NO_TOWER = {"layers": 0, "width": 1, "head_width": 1, "patch_size": 1, "image_size": 1}


class SiglipCLIP(CustomTextCLIP):
    """open_clip's CustomTextCLIP with a SigLIP image tower of timm.

    Args:
        embed_dim: width of the features, and of the image tower.
        vision_cfg: `timm_kwargs`, see `SiglipTower`; the rest is for the preprocessing.
        text_cfg: open_clip's.
        kwargs: further fields of an open_clip model config.
    """

    def __init__(self, embed_dim: int, vision_cfg: dict[str, Any], text_cfg: dict[str, Any], **kwargs: Any):
        super().__init__(embed_dim, _NO_TOWER, text_cfg, **kwargs)
        self.visual = SiglipTower(**vision_cfg["timm_kwargs"])


class SiglipTower(TimmModel):
    """timm's SigLIP image tower.

    Args:
        img_size: side of the image, in pixels.
        eps: of the layer norms.
        sizes: further arguments of timm's VisionTransformer.
    """

    def __init__(self, img_size: int, eps: float, **sizes: Any):
        nn.Module.__init__(self)  # TimmModel's builds one of timm's sizes
        self.image_size = (img_size, img_size)
        self.trunk = timm.create_model(
            TIMM_MODEL,
            num_classes=0,
            pretrained_cfg_overlay={"input_size": (3, img_size, img_size)},
            norm_layer=partial(LayerNorm, eps=eps),
            **sizes,
        )
        self.head = nn.Sequential()
