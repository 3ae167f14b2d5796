"""Model config and preprocessing of a model name."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from open_clip import factory
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from clip_retrieval.errors import UserError
from clip_retrieval.models import config_schema, names
from clip_retrieval.models.hugging_face import read_model_json
from clip_retrieval.models.model_folder import OPEN_CLIP_CONFIG, find_folder, holds_open_clip
from clip_retrieval.models.names import ModelName
from clip_retrieval.models.schema import SchemaError

State = dict[str, torch.Tensor]
"""A state dict."""

Config = dict[str, Any]
"""A model config or the preprocessing of a model, as plain JSON."""

ClipModule = Any
"""A CLIP or a part of it: open_clip's classes, or ours with the same attributes. nn.Module declares every attribute as
`Tensor | Module`, and open_clip has no type hints for them."""


def find_model_config(name: ModelName) -> tuple[Config, Config]:
    """Return the model config and the preprocessing (see `find_preprocess`) of a name.

    Raises UserError if it cannot be fetched or read, or is not a model config.
    """
    # imports this module
    from clip_retrieval.models.transformers_config import read_transformers_folder

    if name.kind == "open_clip":
        return factory.get_model_config(name.config), _common_preprocess(name.config)
    if name.kind in ("hub", "folder"):
        folder = find_folder(name)
        if not holds_open_clip(folder):
            return read_transformers_folder(folder)
        path = folder / OPEN_CLIP_CONFIG
    else:
        path = names.our_configs()[name.config] if name.kind == "ours" else Path(name.config)
    config = read_model_json(path, "model config")
    overrides: Config = {}
    if isinstance(config, dict):
        overrides = config.pop("preprocess_cfg", None) or {}
        config = config.get("model_cfg", config)
    try:
        config_schema.model_config(config, "")
        return config, find_preprocess(overrides)
    except SchemaError as error:
        raise UserError(f"--vision_model {name.name} is not a model config: {error}") from None


def find_preprocess(overrides: Config) -> Config:
    """Return open_clip's PreprocessCfg as plain JSON, with `overrides` (unknown keys are skipped).

    `resize_size`, which open_clip does not have, is the size before a crop to `size`.
    One number for mean or std applies to each channel, as in open_clip. Raises SchemaError for invalid values.
    """
    config_schema.preprocess(overrides, "preprocess_cfg")
    merged = json.loads(json.dumps(merge_preprocess_dict(asdict(PreprocessCfg()), overrides)))
    for key in ("mean", "std"):
        values = merged[key] if isinstance(merged[key], list) else [merged[key]] * 3
        merged[key] = [float(value) for value in values]
    if overrides.get("resize_size"):
        merged["resize_size"] = overrides["resize_size"]
    return merged


def _common_preprocess(config_name: str) -> Config:
    """Return the preprocessing of a model's tags if all agree (SigLIP's do), else OpenAI's."""
    tags = list_pretrained_tags_by_model(config_name)
    found = [find_preprocess(get_pretrained_cfg(config_name, tag)) for tag in tags]
    return found[0] if found and all(preprocess == found[0] for preprocess in found) else find_preprocess({})


def same_tower(a: Config, b: Config) -> bool:
    """Whether two tower configs are equal except for sizes that position embeddings are resized to.

    Compares the fields that the two `hf_config` of Hugging Face towers have in common. Ignores the tokenizer.
    """
    hf_a, hf_b = (c.get("hf_config", {}) for c in (a, b))
    tokenizer = {"vocab", "tokenizer_files", "hf_tokenizer_name", "tokenizer_kwargs"}
    free = tokenizer | {"image_size", "context_length", "hf_config", "hf_model_pretrained", "timm_model_pretrained"}
    defaults = {"head_width": 64, "mlp_ratio": 4.0, "patch_size": None}
    a, b = ({k: v for k, v in {**defaults, **c}.items() if k not in free} for c in (a, b))
    return a == b and all(hf_a[size] == hf_b[size] for size in hf_a.keys() & hf_b.keys())


def count_layers(state: State, prefix: str) -> int:
    """Count the layers in `state` named `prefix` and a number."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})
