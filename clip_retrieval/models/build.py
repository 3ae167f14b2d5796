"""Build a model from options or from a checkpoint of ours: its config, its weights and its preprocessing."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass

import torch
from open_clip.timm_model import TimmModel

from clip_retrieval.errors import UserError
from clip_retrieval.models import names
from clip_retrieval.models.families import find_family
from clip_retrieval.models.instantiate import height_and_width, instantiate, try_model
from clip_retrieval.models.libraries import translate_errors
from clip_retrieval.models.load import check_adaptor, load_into
from clip_retrieval.models.model_config import ClipModule, Config, State, find_preprocess
from clip_retrieval.models.source import ModelSource, find_source, tags_of
from clip_retrieval.models.towers import split_adaptor, text_part
from clip_retrieval.options import ModelOptions

# SigLIP's initial values, https://arxiv.org/abs/2303.15343.
SIGLIP_SCALE = math.log(10)
SIGLIP_BIAS = -10.0
DEFAULT_IMAGE_SIZE = 224
RESNET_STRIDE = 32


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
    sizes = options.image_size, options.context_length, options.keep_positions
    return _build(source, *sizes, logit_bias=logit_bias)


def rebuild_model(
    config: Config,
    preprocess: Config,
    state: State,
    name: str,
    source: str,
    *,
    image_size: int | None = None,
    context_length: int | None = None,
    keep_positions: int | None = None,
    logit_bias: bool = False,
) -> BuiltModel:
    """Rebuild a model from a checkpoint of ours: the attributes of a `BuiltModel`, and the state dict.

    Raises UserError, naming `source`, if they do not fit each other.
    """
    name = find_family(config).config_name(config) or name
    model = ModelSource(name, config, preprocess, source, state, config_from=source)
    return _build(model, image_size, context_length, keep_positions, logit_bias=logit_bias)


def known_tags(name: str) -> list[str]:
    """Return the tags of a model's pretrained weights; empty for a model without tags."""
    try:
        return tags_of(names.resolve(name))
    except UserError:
        return []


def _build(
    source: ModelSource,
    image_size: int | None,
    context_length: int | None,
    keep_positions: int | None,
    *,
    logit_bias: bool,
) -> BuiltModel:
    config, config_from = deepcopy(source.config), source.config_from or source.name
    _set_sizes(config, source.name, image_size, context_length)
    state = source.state or {}
    if (logit_bias or "logit_bias" in state) and config.get("init_logit_bias") is None:
        config["init_logit_bias"] = SIGLIP_BIAS
    clip = instantiate(config, config_from)
    _check_context_length(context_length, _position_limit(clip), source.name)

    # weights
    state, adaptor = split_adaptor(state)
    if source.state is not None:
        # timm resizes the position embeddings itself, after it has the weights at their own size
        if _has_other_size(clip, state):
            _resize_timm(clip, config, source.name)
        load_into(clip, state, source.weights, source.name, source.random, keep_positions)
        check_adaptor(adaptor, config["embed_dim"], source.weights)
    _resize_timm(clip, config, source.name)
    if logit_bias and "logit_bias" not in state:
        torch.nn.init.constant_(clip.logit_scale, config.get("init_logit_scale", SIGLIP_SCALE))
        torch.nn.init.constant_(clip.logit_bias, config["init_logit_bias"])

    # preprocessing
    preprocess = find_preprocess(source.preprocess)
    size = config["vision_cfg"].get("image_size", DEFAULT_IMAGE_SIZE)
    if "resize_size" in preprocess:
        preprocess["resize_size"] = round(
            preprocess["resize_size"] * max(height_and_width(size)) / max(height_and_width(preprocess["size"]))
        )
    preprocess["size"] = size
    # The logit scale is missing too in weights of single towers, but has an initial value of its own.
    keys = clip.state_dict().keys() - {"logit_scale"}
    random = tuple(prefix.rstrip(".") for prefix in source.random if any(key.startswith(prefix) for key in keys))
    clip = clip.float().eval()
    if not source.is_known or image_size or context_length:
        try_model(clip, config, preprocess, config_from)
    return BuiltModel(clip, config, preprocess, source.name, source.weights, adaptor or None, random, config_from)


def _set_sizes(config: Config, name: str, image_size: int | None, context_length: int | None) -> None:
    vision, text = config["vision_cfg"], config["text_cfg"]
    if image_size:
        unit = RESNET_STRIDE if isinstance(vision.get("layers"), (list, tuple)) else vision.get("patch_size") or 1
        if image_size % unit:
            raise UserError(f"--image_size {image_size}: must be a multiple of {unit} for {name}")
        vision["image_size"] = image_size
    if context_length:
        # the built tower decides; simple-clip's refuses to be built with more
        _check_context_length(context_length, text.get("hf_config", {}).get("max_position_embeddings", math.inf), name)
        text["context_length"] = context_length


def _check_context_length(length: int | None, limit: float, name: str) -> None:
    if length and length > limit:
        raise UserError(f"--context_length {length}: must be at most {limit} for {name}")


def _position_limit(clip: ClipModule) -> float:
    """Return the most tokens that a Hugging Face text tower has positions for; infinity for other towers."""
    embeddings = getattr(text_part(clip).transformer, "embeddings", None)
    positions = getattr(embeddings, "position_embeddings", None)
    if positions is None:
        return math.inf
    # RoBERTa's positions start behind that of padding
    return positions.num_embeddings - (0 if positions.padding_idx is None else positions.padding_idx + 1)


def _has_other_size(clip: ClipModule, state: State) -> bool:
    key = "visual.trunk.pos_embed"
    return key in state and isinstance(clip.visual, TimmModel) and state[key].shape != clip.state_dict()[key].shape


def _resize_timm(clip: ClipModule, config: Config, name: str) -> None:
    """Resize a timm image tower from timm's default image size to the config's."""
    if not isinstance(clip.visual, TimmModel):
        return
    size = config["vision_cfg"].get("image_size", DEFAULT_IMAGE_SIZE)
    if clip.visual.trunk.default_cfg["input_size"][-1] == size:
        return
    patch = getattr(getattr(clip.visual.trunk, "patch_embed", None), "patch_size", 1)
    if any(side % each for side, each in zip(height_and_width(size), height_and_width(patch))):
        unit = patch if isinstance(patch, int) else patch[0]
        raise UserError(f"--image_size {size}: must be a multiple of {unit} for {name}")
    with translate_errors(f"--image_size {size}: does not fit {name}", "give another size"):
        clip.visual.set_input_size(size)
