"""Which model is meant: from names, tags and files to a config, preprocessing and weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip import factory
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from clip_retrieval.errors import UserError
from clip_retrieval.models import chinese_clip, hub, names, weights
from clip_retrieval.models.names import NO_WEIGHTS, OWN_WEIGHTS, ModelName
from clip_retrieval.models.weights import Weights, read_bert, read_weights
from clip_retrieval.options import ModelOptions


@dataclass
class ModelSource:
    """A model before it is built.

    Attributes:
        name: canonical name.
        config: open_clip's model config.
        preprocess: open_clip's PreprocessCfg, as plain JSON.
        weights: where the weights are from: a tag, "none", "own" (a hub id's or folder's) or a file.
        state: the weights, or None for random ones.
        random: beginnings of the names of weights that `state` may lack: they stay random.
    """

    name: str
    config: dict[str, Any]
    preprocess: dict[str, Any]
    weights: str
    state: dict[str, torch.Tensor] | None = None
    random: tuple[str, ...] = ()


def find_source(options: ModelOptions, typed_model: bool) -> ModelSource:
    """The model that `options` name, its weights read but not built yet. See `build.build_model`."""
    name = names.resolve(options.vision_model)
    if options.text_pretrained and not options.text_model:
        raise UserError(f"--text_pretrained {options.text_pretrained} needs --text_model, the tower that it is for")
    pretrained = options.pretrained or (NO_WEIGHTS if options.text_model else name.default_weights)
    tag_config = get_pretrained_cfg(name.config, pretrained)
    if pretrained == NO_WEIGHTS or (pretrained == OWN_WEIGHTS and name.kind in ("hub", "folder")):
        return _named_source(options, name, pretrained)
    if tag_config:
        path = hub.fetch_tag(name.name, pretrained, tag_config)
        if options.text_model:
            return _two_towers(options, name, pretrained, read_weights(path).state)
        config, _ = _read_config(name)
        config["quick_gelu"] = tag_config.get("quick_gelu", config.get("quick_gelu", False))
        return ModelSource(name.name, config, _preprocess(tag_config), pretrained, read_weights(path).state)
    _check_is_no_tag(pretrained, name)
    found = read_weights(pretrained)
    whole = found.kind in (weights.OURS, weights.CHINESE_CLIP)
    if whole and options.text_pretrained:
        raise UserError(f"{found.source} has the weights of its text tower; leave --text_pretrained out")
    if options.text_model and not whole:
        return _two_towers(options, name, found.source, found.state)
    if found.kind == weights.OURS:
        return _ours(found, options, typed_model)
    if found.kind == weights.CHINESE_CLIP:
        config = chinese_clip.infer_config(found.state, found.source)
        _check_chinese_names(config, options, name if typed_model else None, found.source)
        preprocess = _preprocess(chinese_clip.PREPROCESS)
        return ModelSource(chinese_clip.model_name(config), config, preprocess, found.source, found.state)
    source = _named_source(options, name, found.source)
    source.state = found.state
    if found.kind in (weights.OPENAI_ARCHIVE, weights.OPENAI_CODE) or name.openai_spelling:
        source.config["quick_gelu"] = True
    if found.kind == weights.OPENAI_CODE:
        _take_text_layers(source)
    return source


def _check_is_no_tag(pretrained: str, name: ModelName) -> None:
    """What is neither a tag nor a file is taken for a misspelt tag, unless it looks like a path."""
    path = Path(pretrained)
    if path.exists() or path.suffix in (".pt", ".pth", ".bin", ".safetensors") or "/" in pretrained:
        return
    tags = list_pretrained_tags_by_model(name.config)
    known = f"its tags are {', '.join([*tags, NO_WEIGHTS])}" if tags else "it has no tags: give a file, or none"
    raise UserError(
        f"--pretrained {pretrained} is neither a file nor a tag of {name.name}"
        f"{names.nearest(pretrained, tags)}; {known}"
    )


def _named_source(options: ModelOptions, name: ModelName, pretrained: str) -> ModelSource:
    """Config and preprocessing by name; weights only where a hub id or folder has its own."""
    if options.text_model:
        return _two_towers(options, name, pretrained, {})
    config, preprocess = _read_config(name)
    source = ModelSource(name.name, config, preprocess, pretrained)
    if pretrained == OWN_WEIGHTS:
        location = name.config.partition(":")[2]
        path = hub.fetch_hub_weights(location) if name.kind == "hub" else _weights_in(location)
        source.state = read_weights(path).state
    return source


def _two_towers(options: ModelOptions, name: ModelName, pretrained: str, state: dict[str, torch.Tensor]) -> ModelSource:
    """A model of Chinese-CLIP, its image tower from the weights of any CLIP, its text tower from a BERT's."""
    config = chinese_clip.reference_config(name.config, options.text_model)
    model, preprocess = chinese_clip.model_name(config), _preprocess(chinese_clip.PREPROCESS)
    image = {name: v for name, v in state.items() if name.startswith("visual.") or name == "logit_scale"}
    if state and not image:
        raise UserError(f"--pretrained {pretrained} holds no image tower (visual.*); give the weights of a CLIP")
    text = read_bert(options.text_pretrained) if options.text_pretrained else {}
    if not image and not text:
        return ModelSource(model, config, preprocess, NO_WEIGHTS)
    # What neither has: the projection of the text tower, and the tower that starts from nothing.
    random = ("text.proj." if text else "text.", *(() if image else ("visual.", "logit_scale")))
    held = f"{pretrained} for images, {options.text_pretrained or NO_WEIGHTS} for captions"
    return ModelSource(model, config, preprocess, held, image | text, random)


def _weights_in(folder: str) -> str:
    with hub.quiet():
        path = factory._find_checkpoint_in_dir(Path(folder))
    if path is None:
        raise UserError(f"local-dir:{folder} holds no weights; give them as --pretrained FILE, or --pretrained none")
    return path


def _read_config(name: ModelName) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model config and preprocessing of a name."""
    if name.kind == "open_clip":
        return factory.get_model_config(name.config), _common_preprocess(name.config)
    if name.kind == "hub":
        content = hub.fetch_hub_config(name.config.removeprefix(names.HUB))
    elif name.kind == "folder":
        content = _read_json(Path(name.config.removeprefix(names.FOLDER)) / "open_clip_config.json")
    else:
        content = _read_json(names.our_configs()[name.config] if name.kind == "ours" else Path(name.config))
    config = content.get("model_cfg", content) if isinstance(content, dict) else {}
    kinds = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
    if lacking := [key for key, kind in kinds.items() if not isinstance(config.get(key), kind)]:
        raise UserError(f"--vision_model {name.name} is not a model config: it has no {', '.join(lacking)}")
    return config, _preprocess(content.get("preprocess_cfg", {}))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such model config") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not a model config: {error}") from None


def _preprocess(overrides: dict[str, Any]) -> dict[str, Any]:
    """A PreprocessCfg as plain JSON, with `overrides` (other keys of theirs are left out)."""
    return json.loads(json.dumps(merge_preprocess_dict(asdict(PreprocessCfg()), overrides)))


def _common_preprocess(config_name: str) -> dict[str, Any]:
    """The preprocessing of all of a model's tags, where they agree (SigLIP's do), else OpenAI's."""
    tags = list_pretrained_tags_by_model(config_name)
    of_tags = [_preprocess(get_pretrained_cfg(config_name, tag)) for tag in tags]
    return of_tags[0] if of_tags and all(p == of_tags[0] for p in of_tags) else _preprocess({})


def _ours(found: Weights, options: ModelOptions, typed_model: bool) -> ModelSource:
    """A checkpoint of ours: its own config decides."""
    config = found.model_config
    held = found.options.get("vision_model") or "model without a name"
    if chinese_clip.is_chinese_clip(config):
        held = chinese_clip.model_name(config)
    check_names(options, typed_model, config, held, found.source)
    return ModelSource(held, config, found.preprocess or _preprocess({}), found.source, found.state)


def check_names(options: ModelOptions, typed_model: bool, config: dict[str, Any], held: str, source: str) -> None:
    """Raise UserError where the names that were typed contradict a checkpoint of ours.

    Args:
        options: --vision_model (which counts if `typed_model`) and --text_model.
        config: the model config in the checkpoint.
        held: the name of the model in it.
        source: the checkpoint's file.
    """
    name = names.resolve(options.vision_model) if typed_model else None
    if name and held in (name.name, name.config):
        name = None
    if chinese_clip.is_chinese_clip(config):
        _check_chinese_names(config, options, name, source)
        return
    if name and not _same_model(_read_config(name)[0], config):
        raise UserError(
            f"--vision_model {name.name} contradicts {source}, which holds a {held}; leave --vision_model out, or give "
            "another checkpoint"
        )
    if options.text_model not in (None, config["text_cfg"].get("hf_model_name")):
        raise UserError(f"--text_model {options.text_model} contradicts {source}; leave it out")


def _same_model(a: dict[str, Any], b: dict[str, Any]) -> bool:
    towers = all(chinese_clip.same_tower(a[tower], b[tower]) for tower in ("vision_cfg", "text_cfg"))
    return towers and a["embed_dim"] == b["embed_dim"]


def _check_chinese_names(config: dict[str, Any], options: ModelOptions, typed: ModelName | None, source: str) -> None:
    """A Chinese-CLIP checkpoint decides; names that were typed must agree with it."""
    holds = config["text_cfg"]["hf_model_name"]
    if options.text_model not in (None, holds):
        raise UserError(
            f"--text_model {options.text_model} contradicts {source}, which holds another text tower ({holds} of "
            f"{config['text_cfg']['hf_config']['num_hidden_layers']} layers); leave it out"
        )
    if typed and not chinese_clip.same_tower(_read_config(typed)[0]["vision_cfg"], config["vision_cfg"]):
        raise UserError(
            f"--vision_model {typed.name} contradicts {source}, which holds a {chinese_clip.model_name(config)}; "
            "leave it out"
        )


def _take_text_layers(source: ModelSource) -> None:
    """clip-training's RN50 has half of OpenAI's text layers: the file tells."""
    layers = chinese_clip.count_layers(source.state, "transformer.resblocks.")
    if layers:
        source.config["text_cfg"]["layers"] = layers
