"""Build a model from options or from a checkpoint of ours: its config, its weights and its preprocessing."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass

import torch

from clip_retrieval.errors import UserError
from clip_retrieval.models import config_schema, names
from clip_retrieval.models.families import find_family
from clip_retrieval.models.image_size import (
    ImageSize,
    check_image_size,
    format_size,
    height_and_width,
    resize_image_tower,
    resize_to_weights,
)
from clip_retrieval.models.instantiate import INVALID, REMEDY, instantiate, try_model
from clip_retrieval.models.libraries import translate_errors
from clip_retrieval.models.load import check_adaptor, load_into
from clip_retrieval.models.model_config import ClipModule, Config, State, find_preprocess
from clip_retrieval.models.schema import SchemaError
from clip_retrieval.models.source import ModelSource, find_source, tags_of
from clip_retrieval.models.towers import split_adaptor, text_part
from clip_retrieval.options import ModelOptions

# SigLIP's initial values, https://arxiv.org/abs/2303.15343.
SIGLIP_SCALE = math.log(10)
SIGLIP_BIAS = -10.0
DEFAULT_IMAGE_SIZE = 224


@dataclass
class BuiltModel:
    """A model, and everything needed to rebuild it.

    Attributes:
        clip: open_clip's CLIP, CustomTextCLIP or CoCa, or a SimpleCLIP, float32, on the CPU, in evaluation mode.
        config: open_clip's model config, with a Hugging Face text tower's own config (`text_cfg.hf_config`) and the
            vocabulary that `keep_vocabulary` adds (`text_cfg.vocab`): `rebuild_model` needs no network. Plain JSON.
        preprocess: open_clip's PreprocessCfg. Plain JSON.
        name: canonical name.
        weights: a tag of open_clip or torchvision, "none" (random), "own" (a hub id's or folder's), or a file.
        adaptor_state: weights of an adaptor (`0.weight`, `2.weight`) if the file has one.
        random: name prefixes of random weights if the other weights are not, e.g. "text.proj".
        config_from: source of the config, for messages: the name, or a checkpoint's file.
    """

    clip: ClipModule
    config: Config
    preprocess: Config
    name: str
    weights: str
    adaptor_state: State | None = None
    random: tuple[str, ...] = ()
    config_from: str = ""


def build_model(options: ModelOptions, *, typed_model: bool = False, logit_bias: bool = False) -> BuiltModel:
    """Build the model of `options` with its weights.

    Args:
        options: names, weights and sizes.
        typed_model: whether the user typed --vision_model: then a checkpoint of another model is an error; otherwise
            the checkpoint decides.
        logit_bias: add a logit bias (SigLIP loss). If the weights have none, scale and bias get the initial values of
            the model config (`init_logit_scale`, `init_logit_bias`), or else SigLIP's.

    Raises:
        UserError: an unknown name or tag, or weights that cannot be fetched or read, or do not fit.
    """
    source = find_source(options, typed_model)
    return _build(source, options, logit_bias=logit_bias)


def rebuild_model(
    config: Config,
    preprocess: Config,
    state: State,
    name: str,
    source: str,
    options: ModelOptions | None = None,
    *,
    logit_bias: bool = False,
) -> BuiltModel:
    """Rebuild a model from a checkpoint of ours: the attributes of a `BuiltModel`, and the state dict.

    `options` give its sizes. Raises UserError, naming `source`, if they do not fit each other.
    """
    name = find_family(config).config_name(config) or name
    model = ModelSource(name, config, preprocess, source, state, config_from=source)
    return _build(model, options or ModelOptions(), logit_bias=logit_bias)


def known_tags(name: str) -> list[str]:
    """Return the tags of a model's pretrained weights; empty for a model without tags."""
    try:
        return tags_of(names.resolve(name))
    except UserError:
        return []


def _build(source: ModelSource, options: ModelOptions, *, logit_bias: bool) -> BuiltModel:
    image_size, context_length = options.image_size, options.context_length
    config, config_from = deepcopy(source.config), source.config_from or source.name
    vision, text = config["vision_cfg"], config["text_cfg"]
    own_size = vision.get("image_size", DEFAULT_IMAGE_SIZE)
    size = list(image_size) if isinstance(image_size, tuple) else image_size or own_size
    is_resized = height_and_width(size) != height_and_width(own_size)

    # the module, with random weights
    if is_resized:
        vision["image_size"] = size
    has_limit = bool(text.get("hf_model_name") or text.get("hf_config"))
    if context_length and not has_limit:
        text["context_length"] = context_length
    state = source.state or {}
    if (logit_bias or "logit_bias" in state) and config.get("init_logit_bias") is None:
        config["init_logit_bias"] = SIGLIP_BIAS
    clip = instantiate(config, config_from)
    if is_resized:
        check_image_size(clip.visual, size, source.name)
        _check_limits(config, size)
    if context_length and has_limit:
        if context_length > (limit := _position_limit(clip)):
            raise UserError(f"--context_length {context_length}: must be at most {limit} for {source.name}")
        text["context_length"] = context_length

    # weights, at their own image size first
    state, adaptor = split_adaptor(state)
    unfit = f"--image_size {format_size(size)}: does not fit {source.name}", "give another size"
    if source.state is not None:
        with translate_errors(*unfit):
            resize_to_weights(clip.visual, state, own_size, size)
        load_into(clip, state, source.weights, source.name, source.random, options.keep_positions)
        check_adaptor(adaptor, config["embed_dim"], source.weights)
    with translate_errors(*unfit):
        resize_image_tower(clip.visual, size)
    if logit_bias and "logit_bias" not in state:
        torch.nn.init.constant_(clip.logit_scale, config.get("init_logit_scale", SIGLIP_SCALE))
        torch.nn.init.constant_(clip.logit_bias, config["init_logit_bias"])

    # a first use
    preprocess = _preprocess_at(source.preprocess, size)
    clip = clip.float().eval()
    if not source.is_known or image_size or context_length:
        with translate_errors(*(unfit if is_resized else (f"{config_from} {INVALID}", REMEDY))):
            try_model(clip, config, preprocess)
    # The logit scale is missing too in weights of single towers, but has an initial value of its own.
    keys = clip.state_dict().keys() - {"logit_scale"}
    random = tuple(prefix.rstrip(".") for prefix in source.random if any(key.startswith(prefix) for key in keys))
    return BuiltModel(clip, config, preprocess, source.name, source.weights, adaptor or None, random, config_from)


def _preprocess_at(preprocess: Config, size: ImageSize) -> Config:
    """Return the preprocessing for another image size. A size before the crop changes in proportion."""
    preprocess = find_preprocess(preprocess)
    if "resize_size" in preprocess:
        scale = max(height_and_width(size)) / max(height_and_width(preprocess["size"]))
        preprocess["resize_size"] = round(preprocess["resize_size"] * scale)
    return preprocess | {"size": size}


def _check_limits(config: Config, size: ImageSize) -> None:
    """Raise UserError for a size at which a checkpoint of the model would be refused."""
    try:
        config_schema.model_config(config, "")
    except SchemaError as error:
        raise UserError(f"--image_size {format_size(size)}: {error}; give another size") from None


def _position_limit(clip: ClipModule) -> float:
    """Return the most tokens that a Hugging Face text tower has positions for; infinity for other towers."""
    embeddings = getattr(text_part(clip).transformer, "embeddings", None)
    positions = getattr(embeddings, "position_embeddings", None)
    if positions is None:
        return math.inf
    # RoBERTa's positions start behind that of padding
    return positions.num_embeddings - (0 if positions.padding_idx is None else positions.padding_idx + 1)
