"""From options to a model: its config, its weights, and the tokenizer that goes with it."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.timm_model import TimmModel

from clip_retrieval.errors import UserError, describe
from clip_retrieval.models import chinese_clip, hub, names
from clip_retrieval.models.instantiate import height_and_width, instantiate, try_model
from clip_retrieval.models.load import check_adaptor, load_into
from clip_retrieval.models.model_config import find_preprocess
from clip_retrieval.models.source import ModelSource, find_source, tags_of
from clip_retrieval.options import ModelOptions

# Where SigLIP starts, https://arxiv.org/abs/2303.15343.
SIGLIP_SCALE = math.log(10)
SIGLIP_BIAS = -10.0
DEFAULT_IMAGE_SIZE = 224
RESNET_STRIDE = 32
ADAPTOR = "adaptor."


@dataclass
class BuiltModel:
    """A model, and what is needed to make it again.

    Attributes:
        clip: open_clip's CLIP, CustomTextCLIP or CoCa, or a SimpleCLIP, float32, on the CPU, in evaluation mode.
        config: open_clip's model config, and the text tower's own config where it is a Hugging Face one
            (`text_cfg.hf_config`), with the words of its tokenizer where `keep_vocabulary` put them
            (`text_cfg.vocab`): all that `rebuild_model` needs, without a network. Plain JSON.
        preprocess: open_clip's PreprocessCfg. Plain JSON.
        name: canonical name.
        weights: a tag of open_clip or torchvision, "none" for random ones, "own" for a hub id's, or the file.
        adaptor_state: weights of an adaptor (`0.weight`, `2.weight`) found in the file.
        random: beginnings of the names of what is random although there are weights for the rest, e.g. "text.proj".
        config_from: where the config is from, for messages: the name, or a checkpoint's file.
    """

    clip: torch.nn.Module
    config: dict[str, Any]
    preprocess: dict[str, Any]
    name: str
    weights: str
    adaptor_state: dict[str, torch.Tensor] | None = None
    random: tuple[str, ...] = ()
    config_from: str = ""


def build_model(options: ModelOptions, *, typed_model: bool = False, logit_bias: bool = False) -> BuiltModel:
    """The model that `options` name, with its weights.

    Args:
        options: see there.
        typed_model: the user named --vision_model, so a checkpoint that holds another model is an error; otherwise
            the checkpoint decides.
        logit_bias: give the model a logit bias (SigLIP loss). Where the weights have none, scale and bias start
            where SigLIP's do, or where the model config says (`init_logit_scale`, `init_logit_bias`).

    Raises:
        UserError: an unknown name or tag, weights that cannot be fetched or read or do not fit.
    """
    source = find_source(options, typed_model)
    return _build(source, options.image_size, options.context_length, logit_bias)


def rebuild_model(
    config: dict[str, Any],
    preprocess: dict[str, Any],
    state: dict[str, torch.Tensor],
    name: str,
    source: str,
    *,
    image_size: int | None = None,
    context_length: int | None = None,
    logit_bias: bool = False,
) -> BuiltModel:
    """The model of a checkpoint of ours: what `BuiltModel` held, and the state dict.

    Raises UserError, naming `source`, where the parts do not fit.
    """
    if chinese_clip.is_chinese_clip(config):
        name = chinese_clip.model_name(config)
    return _build(
        ModelSource(name, config, preprocess, source, state, config_from=source), image_size, context_length, logit_bias
    )


def known_tags(name: str) -> list[str]:
    """The tags of pretrained weights for a model; none for a name that there are none for."""
    try:
        return tags_of(names.resolve(name))
    except UserError:
        return []


def _build(source: ModelSource, image_size: int | None, context_length: int | None, logit_bias: bool) -> BuiltModel:
    config, config_from = deepcopy(source.config), source.config_from or source.name
    _set_sizes(config, source.name, image_size, context_length)
    state = source.state or {}
    if (logit_bias or "logit_bias" in state) and config.get("init_logit_bias") is None:
        config["init_logit_bias"] = SIGLIP_BIAS
    clip = instantiate(config, config_from)

    # Weights.
    adaptor = {name.removeprefix(ADAPTOR): v for name, v in state.items() if name.startswith(ADAPTOR)}
    if source.state is not None:
        state = {name: v for name, v in state.items() if not name.startswith(ADAPTOR)}
        # timm fits the position embeddings itself, and needs the weights at their own size for it.
        if _holds_other_size(clip, state):
            _resize_timm(clip, config, source.name)
        load_into(clip, state, source.weights, source.name, source.random)
        check_adaptor(adaptor, config["embed_dim"], source.weights)
    _resize_timm(clip, config, source.name)
    if logit_bias and "logit_bias" not in state:
        torch.nn.init.constant_(clip.logit_scale, config.get("init_logit_scale", SIGLIP_SCALE))
        torch.nn.init.constant_(clip.logit_bias, config["init_logit_bias"])

    preprocess = find_preprocess(source.preprocess)
    preprocess["size"] = config["vision_cfg"].get("image_size", DEFAULT_IMAGE_SIZE)
    # The scale, too, is in no file of a tower's, but starts at a value of its own.
    random = tuple(name.rstrip(".") for name in source.random if name != "logit_scale")
    clip = clip.float().eval()
    if not source.is_known or image_size or context_length:
        try_model(clip, config, preprocess, config_from)
    return BuiltModel(clip, config, preprocess, source.name, source.weights, adaptor or None, random, config_from)


def _set_sizes(config: dict[str, Any], name: str, image_size: int | None, context_length: int | None) -> None:
    vision, text = config["vision_cfg"], config["text_cfg"]
    if image_size:
        unit = RESNET_STRIDE if isinstance(vision.get("layers"), (list, tuple)) else vision.get("patch_size") or 1
        if image_size % unit:
            raise UserError(f"--image_size {image_size}: {name} takes multiples of {unit}")
        vision["image_size"] = image_size
    if context_length:
        limit = text.get("hf_config", {}).get("max_position_embeddings") or context_length
        if context_length > limit:
            raise UserError(f"--context_length {context_length}: {name} takes up to {limit} tokens")
        text["context_length"] = context_length


def _holds_other_size(clip: torch.nn.Module, state: dict[str, torch.Tensor]) -> bool:
    key = "visual.trunk.pos_embed"
    return key in state and isinstance(clip.visual, TimmModel) and state[key].shape != clip.state_dict()[key].shape


def _resize_timm(clip: torch.nn.Module, config: dict[str, Any], name: str) -> None:
    """Bring a timm image tower from timm's own image size to the config's."""
    if not isinstance(clip.visual, TimmModel):
        return
    size = config["vision_cfg"].get("image_size", DEFAULT_IMAGE_SIZE)
    if clip.visual.trunk.default_cfg["input_size"][-1] == size:
        return
    patch = getattr(getattr(clip.visual.trunk, "patch_embed", None), "patch_size", 1)
    if any(side % each for side, each in zip(height_and_width(size), height_and_width(patch))):
        raise UserError(
            f"--image_size {size}: {name} takes multiples of {patch if isinstance(patch, int) else patch[0]}"
        )
    try:
        with hub.quiet():
            clip.visual.set_input_size(size)
    except Exception as error:  # of every kind, timm has many towers
        raise UserError(f"--image_size {size}: {name} does not take it ({describe(error)})") from None
