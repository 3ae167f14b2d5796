"""Schemas of a model config and its preprocessing."""

from __future__ import annotations

from typing import Any

from open_clip.coca_model import MultimodalCfg
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from clip_retrieval.models.schema import (
    Check,
    SchemaError,
    either,
    entries,
    fields,
    nothing,
    number,
    one_of,
    record,
    sequence,
    text,
    unknown,
    whole,
)

SIDE = whole(1, 2048)
MOST_PATCHES = 2**13
flag = one_of(False, True)


def _nullable(checks: dict[str, Check]) -> dict[str, Check]:
    return {name: either(nothing, check) for name, check in checks.items()}


TOKENIZER_ARGUMENTS = record(
    optional=_nullable(
        {
            "clean": one_of("canonicalize", "lower", "whitespace"),
            "strip_sep_token": flag,
            "language": text,
            "reduction_mask": one_of("", "simple", "random", "shuffle"),
        }
    ),
    rest=unknown,
)

_TIMM_KWARGS = record(
    required={
        **dict.fromkeys(("img_size", "patch_size"), SIDE),
        **dict.fromkeys(("embed_dim", "depth", "num_heads"), whole(1, 2**16)),
        **dict.fromkeys(("mlp_ratio", "eps"), number(above=0)),
        "act_layer": one_of("gelu", "gelu_tanh", "quick_gelu"),
    },
    rest=unknown,
)

_VISION = record(
    optional=fields(CLIPVisionCfg, nullable=True)
    | {"image_size": either(sequence(SIDE, 2), SIDE), "torchvision_model_name": text, "timm_kwargs": _TIMM_KWARGS}
)

_TEXT = record(
    optional=fields(CLIPTextCfg, nullable=True)
    | {
        "context_length": whole(1, 8192),
        "hf_config": record(optional={"model_type": text}),
        "tokenizer_kwargs": either(nothing, TOKENIZER_ARGUMENTS),
        "vocab": sequence(text),
        "tokenizer_files": entries(text),
    }
)

_CONFIG = record(
    required={"embed_dim": whole(1, 2**16), "vision_cfg": _VISION, "text_cfg": _TEXT},
    optional={
        "multimodal_cfg": record(optional=fields(MultimodalCfg, nullable=True)),
        "init_logit_scale": number(),
        **_nullable({"init_logit_bias": number(), "quick_gelu": flag, "custom_text": flag}),
    },
)


def model_config(value: Any, place: str) -> None:
    """Check a model config, open_clip's or ours."""
    _CONFIG(value, place)
    vision = value["vision_cfg"]
    size, patch = vision.get("image_size", CLIPVisionCfg.image_size), vision.get("patch_size")
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    place = f"{place}.vision_cfg".lstrip(".")
    if patch is not None and not 1 <= patch <= min(height, width):
        raise SchemaError(f"{place}.patch_size is {patch}, but the image {height} x {width} pixels")
    if patch is not None and (height // patch) * (width // patch) > MOST_PATCHES:
        raise SchemaError(f"{place} divides an image into more than {MOST_PATCHES:,} patches")


preprocess = record(
    optional=_nullable(
        {
            "size": either(sequence(SIDE, 1, 2), SIDE),
            "resize_size": SIDE,
            "mode": one_of("RGB"),
            "mean": either(number(), sequence(number(), 3)),
            "std": either(number(above=0), sequence(number(above=0), 3)),
            "interpolation": one_of("bicubic", "bilinear", "random"),
            "resize_mode": one_of("shortest", "longest", "squash"),
            "fill_color": whole(0, 255),
        }
    )
)
