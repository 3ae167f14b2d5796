"""Resolve names, tags and files to a model's config, preprocessing and weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip import factory
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

from clip_retrieval.errors import UserError
from clip_retrieval.models import checkpoint_schema, chinese_clip, hub, names, simple_clip_weights, weights
from clip_retrieval.models.model_config import count_layers, find_model_config, find_preprocess, same_tower
from clip_retrieval.models.names import NO_WEIGHTS, OWN_WEIGHTS, ModelName
from clip_retrieval.models.weights import Weights, read_text_tower, read_weights
from clip_retrieval.options import ModelOptions

WHOLE = (weights.OURS, weights.CHINESE_CLIP, weights.SIMPLE_CLIP)
"""Kinds of files that define their whole model."""

KNOWN = ("open_clip", "ours")
"""Kinds of names whose configs are tested; a user's config is tried first."""

CLIP_TRAINING_MODEL = "RN50-text6"
"""Our name of clip-training's model."""


@dataclass
class ModelSource:
    """A model before it is built.

    Attributes:
        name: canonical name.
        config: open_clip's model config.
        preprocess: open_clip's PreprocessCfg, as plain JSON.
        weights: source of the weights: a tag, "none", "own" (a hub id's or folder's) or a file.
        state: the weights, or None for random ones.
        random: name prefixes of weights that may be missing in `state`: they stay random.
        is_known: whether the config is open_clip's or ours.
        config_from: the file with the config, or from which it was inferred; None if `name` has the config.
    """

    name: str
    config: dict[str, Any]
    preprocess: dict[str, Any]
    weights: str
    state: dict[str, torch.Tensor] | None = None
    random: tuple[str, ...] = ()
    is_known: bool = False
    config_from: str | None = None


def find_source(options: ModelOptions, typed_model: bool) -> ModelSource:
    """Find the model of `options` and read its weights, without building it. See `build.build_model`."""
    name = names.resolve(options.vision_model)
    pretrained = options.pretrained or (NO_WEIGHTS if options.text_model else name.default_weights)
    own = pretrained == OWN_WEIGHTS and name.kind in ("hub", "folder")
    if pretrained == NO_WEIGHTS or own or _tag(name, pretrained):
        return _from_name(options, name, pretrained)
    _check_is_no_tag(pretrained, name)
    found = read_weights(pretrained)
    if found.kind in WHOLE:
        return _whole(found, options, typed_model)
    return _from_file(found, options, name, typed_model)


def tags_of(name: ModelName) -> list[str]:
    """Return the tags of open_clip's or torchvision's weights for a model."""
    return [*list_pretrained_tags_by_model(name.config), *simple_clip_weights.weight_tags(name.config)]


def _tag(name: ModelName, tag: str) -> dict[str, Any] | None:
    """Return open_clip's description of a tag (addresses and preprocessing), or None if there is no such tag."""
    return get_pretrained_cfg(name.config, tag) or simple_clip_weights.weight_tags(name.config).get(tag)


def _check_is_no_tag(pretrained: str, name: ModelName) -> None:
    """Raise UserError for a misspelt tag: neither a file nor anything like a path."""
    path = Path(pretrained)
    if path.exists() or path.suffix in weights.WEIGHT_FILES or "/" in pretrained:
        return
    tags = tags_of(name)
    known = f"choose from {', '.join([*tags, NO_WEIGHTS])}" if tags else "it has no tags: give a file, or none"
    raise UserError(
        f"--pretrained {pretrained} is neither a file nor a tag of {name.name}"
        f"{names.nearest(pretrained, tags)}; {known}"
    )


def _from_name(options: ModelOptions, name: ModelName, pretrained: str) -> ModelSource:
    """Find a model by name, with the weights of a tag, of its hub id or folder, or random ones."""
    two_towers, tag = _has_two_towers(options, name), _tag(name, pretrained)
    state = read_weights(hub.fetch_tag(name.name, pretrained, tag)).state if tag else None
    if two_towers:
        return _two_towers(options, name, pretrained, state or {})
    config, preprocess = find_model_config(name)
    if tag:
        config["quick_gelu"] = tag.get("quick_gelu", config.get("quick_gelu", False))
        preprocess = find_preprocess(tag)
    elif pretrained == OWN_WEIGHTS:
        location = name.config.partition(":")[2]
        path = hub.fetch_hub_weights(location) if name.kind == "hub" else _weights_in(location)
        state = read_weights(path).state
    return ModelSource(name.name, config, preprocess, pretrained, state, is_known=name.kind in KNOWN)


def _from_file(found: Weights, options: ModelOptions, name: ModelName, typed_model: bool) -> ModelSource:
    """Find a model by name, with the weights of a file that does not define the model, or only a part of it."""
    if found.kind == weights.CLIP_TRAINING and not typed_model and not options.text_model:
        name = names.resolve(CLIP_TRAINING_MODEL)
    if _has_two_towers(options, name):
        if not any(key.startswith(simple_clip_weights.TRUNK) for key in found.state):
            return _two_towers(options, name, found.source, found.state)
        _refuse_text_pretrained(options, found.source)
    config, preprocess = find_model_config(name)
    if found.kind in (weights.OPENAI_ARCHIVE, weights.OPENAI_CODE, weights.CLIP_TRAINING) or name.openai_spelling:
        config["quick_gelu"] = True
    if found.kind == weights.CLIP_TRAINING:
        # clip-training has half of OpenAI's text layers, and its own mean and standard deviation.
        config["text_cfg"]["layers"] = count_layers(found.state, "transformer.resblocks.")
        preprocess = find_model_config(names.resolve(CLIP_TRAINING_MODEL))[1]
    return ModelSource(name.name, config, preprocess, found.source, found.state, is_known=name.kind in KNOWN)


def _whole(found: Weights, options: ModelOptions, typed_model: bool) -> ModelSource:
    """Find the model that a file defines; typed names must agree with it."""
    _refuse_text_pretrained(options, found.source)
    if found.kind == weights.OURS:
        config, preprocess, held = found.model_config, found.preprocess, found.options["vision_model"]
    else:
        config, preprocess, held = _infer(found)
    if chinese_clip.is_chinese_clip(config):
        held = chinese_clip.model_name(config)
    check_names(options, typed_model, config, held, found.source)
    return ModelSource(held, config, preprocess, found.source, found.state, config_from=found.source)


def _infer(found: Weights) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Infer the config, preprocessing and name of a model from the shapes of its tensors."""
    with weights.translate_shape_errors(found.source):
        if found.kind == weights.SIMPLE_CLIP:
            held = simple_clip_weights.infer_name(found.state, found.source)
            config, preprocess = (
                simple_clip_weights.infer_config(found.state, found.source),
                simple_clip_weights.PREPROCESS,
            )
        else:
            config, preprocess = chinese_clip.infer_config(found.state, found.source), chinese_clip.PREPROCESS
            held = chinese_clip.UNNAMED
        checkpoint_schema.model_config(config, "")
    return config, find_preprocess(preprocess), held


def _refuse_text_pretrained(options: ModelOptions, source: str) -> None:
    if _text_pretrained(options):
        raise UserError(f"{source} has the weights of its text tower; drop --text_pretrained")


def _text_pretrained(options: ModelOptions) -> str | None:
    return None if options.text_pretrained == NO_WEIGHTS else options.text_pretrained


def _has_two_towers(options: ModelOptions, name: ModelName) -> bool:
    """Whether each tower starts from its own weights. Raises UserError for --text_pretrained if not."""
    if options.text_model or _is_simple_clip(name):
        return True
    if _text_pretrained(options):
        raise UserError(f"--text_pretrained {options.text_pretrained} needs --text_model; give the name of the tower")
    return False


def _is_simple_clip(name: ModelName) -> bool:
    return name.kind in ("ours", "file") and simple_clip_weights.is_simple_clip(find_model_config(name)[0])


def _two_towers(options: ModelOptions, name: ModelName, pretrained: str, state: dict[str, torch.Tensor]) -> ModelSource:
    """Find a Chinese-CLIP (or simple-clip) model: its image tower from `state`, its text tower from --text_pretrained.

    The image tower takes the weights of any CLIP (or of torchvision), the text tower those of a BERT (or DistilBERT).
    """
    if _is_simple_clip(name) and options.text_model in (None, simple_clip_weights.TEXT_MODEL):
        config, preprocess = find_model_config(name)
        model, image = name.name, simple_clip_weights.trunk_weights(state)
        wanted, kind, rename = "torchvision's weights for it", "DistilBERT", simple_clip_weights.distilbert_weights
        random = ("visual.head." if image else "visual.", "logit_scale")
    else:
        _check_text_model(options.text_model, name)
        config = chinese_clip.reference_config(name.config, options.text_model)
        model, preprocess = chinese_clip.model_name(config), find_preprocess(chinese_clip.PREPROCESS)
        image = {key: v for key, v in state.items() if key.startswith("visual.") or key == "logit_scale"}
        wanted, kind, rename = "the weights of a CLIP (visual.*)", "BERT", chinese_clip.bert_to_open_clip
        random = () if image else ("visual.", "logit_scale")
    if state and not image:
        raise UserError(f"--pretrained {pretrained} holds no image tower of {name.name}; give {wanted}")
    place = _text_pretrained(options)
    text = read_text_tower(place, rename, kind, config["text_cfg"]["hf_config"]) if place else {}
    if not image and not text:
        return ModelSource(model, config, preprocess, NO_WEIGHTS)
    random += ("text.proj." if text else "text.",)
    held = f"{pretrained} for images, {place or NO_WEIGHTS} for captions"
    return ModelSource(model, config, preprocess, held, image | text, random)


def _check_text_model(text_model: str, name: ModelName) -> None:
    if text_model == simple_clip_weights.TEXT_MODEL:
        raise UserError(
            f"--text_model {text_model} goes with --vision_model {', '.join(simple_clip_weights.IMAGE_MODELS)}, "
            f"not with {name.name}"
        )
    if text_model not in chinese_clip.TEXT_MODELS:
        known = ", ".join([*chinese_clip.TEXT_MODELS, simple_clip_weights.TEXT_MODEL])
        raise UserError(f"--text_model {text_model}: no such text tower; choose from {known}")


def _weights_in(folder: str) -> str:
    with hub.quiet():
        path = factory._find_checkpoint_in_dir(Path(folder))
    if path is None:
        raise UserError(f"local-dir:{folder} holds no weights; give them as --pretrained FILE, or --pretrained none")
    return path


def check_names(options: ModelOptions, typed_model: bool, config: dict[str, Any], held: str, source: str) -> None:
    """Raise UserError if typed names contradict a checkpoint.

    Args:
        options: --vision_model (used only if `typed_model`) and --text_model.
        config: the model config in the checkpoint.
        held: the model's name in the checkpoint.
        source: the checkpoint's file.
    """
    name = names.resolve(options.vision_model) if typed_model else None
    if name and held in (name.name, name.config):
        name = None
    if chinese_clip.is_chinese_clip(config):
        _check_chinese_names(config, options, name, source)
        return
    if name and not _same_model(find_model_config(name)[0], config):
        raise UserError(
            f"--vision_model {name.name} contradicts {source}, which holds a {held}; drop --vision_model, or give "
            "another checkpoint"
        )
    text_model = (
        simple_clip_weights.TEXT_MODEL
        if simple_clip_weights.is_simple_clip(config)
        else config["text_cfg"].get("hf_model_name")
    )
    if options.text_model not in (None, text_model):
        raise UserError(f"--text_model {options.text_model} contradicts {source}; drop --text_model")


def _same_model(a: dict[str, Any], b: dict[str, Any]) -> bool:
    towers = all(same_tower(a[tower], b[tower]) for tower in ("vision_cfg", "text_cfg"))
    return towers and a["embed_dim"] == b["embed_dim"]


def _check_chinese_names(config: dict[str, Any], options: ModelOptions, typed: ModelName | None, source: str) -> None:
    """Raise UserError if typed names contradict a Chinese-CLIP checkpoint."""
    text_model = config["text_cfg"]["hf_model_name"]
    if options.text_model not in (None, text_model):
        raise UserError(
            f"--text_model {options.text_model} contradicts {source}, which holds {text_model} with "
            f"{config['text_cfg']['hf_config']['num_hidden_layers']} layers; drop --text_model"
        )
    if typed and not same_tower(find_model_config(typed)[0]["vision_cfg"], config["vision_cfg"]):
        raise UserError(
            f"--vision_model {typed.name} contradicts {source}, which holds a {chinese_clip.model_name(config)}; "
            "drop --vision_model"
        )
