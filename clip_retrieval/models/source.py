"""Resolve names, tags and files to a model's config, preprocessing and weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.models import config_schema, hub, names, simple_clip_weights
from clip_retrieval.models.families import FAMILIES, TRANSFORMERS, Family, find_family
from clip_retrieval.models.libraries import translate_errors
from clip_retrieval.models.model_config import (
    Config,
    State,
    count_layers,
    find_model_config,
    find_preprocess,
    same_tower,
)
from clip_retrieval.models.model_folder import TRANSFORMERS_CONFIG, as_folder_name, find_weights
from clip_retrieval.models.names import FOLDER, HUB, NO_WEIGHTS, OWN_WEIGHTS, ModelName
from clip_retrieval.models.peft_adapter import Adapter, read_adapter
from clip_retrieval.models.weights import UNKNOWN_WEIGHTS, WEIGHT_FILES, Weights, read_text_tower, read_weights
from clip_retrieval.options import ModelOptions

KNOWN = ("open_clip", "ours")
"""Kinds of names whose configs are tested; a user's config is tried first."""


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
    config: Config
    preprocess: Config
    weights: str
    state: State | None = None
    random: tuple[str, ...] = ()
    is_known: bool = False
    config_from: str | None = None


def find_source(options: ModelOptions, typed_model: bool) -> ModelSource:
    """Find the model of `options` and read its weights, without building it. See `build.build_model`."""
    name = names.resolve(options.vision_model)
    pretrained = options.pretrained or (NO_WEIGHTS if options.text_model else name.default_weights)
    is_own = pretrained == OWN_WEIGHTS and name.kind in ("hub", "folder")
    tag: Config | None = get_pretrained_cfg(name.config, pretrained)  # addresses and preprocessing
    tag = tag or simple_clip_weights.weight_tags(name.config).get(pretrained)
    file = None

    # a folder or a file may define its whole model
    if pretrained != NO_WEIGHTS and not is_own and not tag:
        if adapter := read_adapter(pretrained):
            return _from_adapter(adapter, options, typed_model, pretrained)
        if folder := as_folder_name(pretrained):
            return _from_folder(folder, options, typed_model, pretrained)
        _refuse_misspelt_tag(pretrained, name)
        file = read_weights(pretrained, options.pretrained_key)
        source = _from_checkpoint(file, options, typed_model) or _from_file_of_folder(file, options, typed_model)
        if file.family.model and not typed_model and not options.text_model:
            name = names.resolve(file.family.model)
        if not typed_model and not options.text_model:
            _log_model(file, source.name if source else file.family.model, name)
        if source:
            return source

    # otherwise the names define it
    config, preprocess = find_model_config(name)
    family = _choose_family(options, name, config)
    source = ModelSource(name.name, config, preprocess, pretrained, is_known=name.kind in KNOWN)

    # weights
    if options.pretrained_key and not file:
        raise UserError(f"--pretrained_key {options.pretrained_key} needs a file as --pretrained; drop one of them")
    if tag:
        source.state = read_weights(hub.fetch_tag(name.name, pretrained, tag)).state
    elif is_own:
        source.state = read_weights(find_weights(name)).state
    elif file:
        source.state, source.weights = file.state, file.source
    if family and not any(key.startswith(simple_clip_weights.TRUNK) for key in source.state or ()):
        return _combine_towers(source, family, options, name)
    _refuse_text_pretrained(options, source.weights)

    # settings that belong to the weights
    if tag:
        config["quick_gelu"] = tag.get("quick_gelu", config.get("quick_gelu", False))
        source.preprocess = find_preprocess(tag)
    elif file:
        if file.family.quick_gelu or name.openai_spelling:
            config["quick_gelu"] = True
        if file.family.model:
            config["text_cfg"]["layers"] = count_layers(file.state, "transformer.resblocks.")
            source.preprocess = find_model_config(names.resolve(file.family.model))[1]
    return source


def tags_of(name: ModelName) -> list[str]:
    """Return the tags of open_clip's or torchvision's weights for a model."""
    return [*list_pretrained_tags_by_model(name.config), *simple_clip_weights.weight_tags(name.config)]


def _log_model(file: Weights, found: str | None, assumed: ModelName) -> None:
    """Log the model of a file that was given without --vision_model: the `found` one, else the default."""
    if found:
        log.info(f"{file.source} decides the model: {found}")
        return
    decides = assumed.openai_spelling and not file.family.quick_gelu
    gelu = f" with QuickGELU (--vision_model {assumed.config}: with GELU)" if decides else ""
    log.warning(f"{file.source} does not name its model: {assumed.name} is assumed{gelu}")


def _refuse_misspelt_tag(pretrained: str, name: ModelName) -> None:
    """Raise UserError for a misspelt tag: neither a file nor anything like a path."""
    path = Path(pretrained)
    if path.exists() or path.suffix in WEIGHT_FILES or "/" in pretrained:
        return
    tags = tags_of(name)
    known = f"choose from {', '.join([*tags, NO_WEIGHTS])}" if tags else "it has no tags: give a file, or none"
    raise UserError(
        f"--pretrained {pretrained} is neither a file nor a tag of {name.name}"
        f"{names.nearest(pretrained, tags)}; {known}"
    )


def _from_folder(
    folder: str, options: ModelOptions, typed_model: bool, source: str, state: State | None = None
) -> ModelSource:
    """Find the model of a `local-dir:` or `hf-hub:` name, given as --pretrained; typed names must agree with it."""
    name = names.resolve(folder)
    config, preprocess = find_model_config(name)
    check_names(options, typed_model, config, name.name, source)
    _refuse_text_pretrained(options, source)
    if state is None:
        state = read_weights(find_weights(name)).state
    return ModelSource(name.name, config, preprocess, source, state)


def _from_adapter(adapter: Adapter, options: ModelOptions, typed_model: bool, source: str) -> ModelSource:
    """Find the base model of an adapter, or a typed `local-dir:` or `hf-hub:` model, and merge the adapter into it."""
    typed = typed_model and options.vision_model.startswith((HUB, FOLDER))
    base = options.vision_model if typed else adapter.find_base()
    state = read_weights(find_weights(names.resolve(base)), change=adapter.merge).state
    return _from_folder(base, options, typed_model, source, state)


def _from_file_of_folder(file: Weights, options: ModelOptions, typed_model: bool) -> ModelSource | None:
    """Find the model of a transformers weight file by the config beside it; without one, a typed model is needed."""
    if file.family is not TRANSFORMERS:
        return None
    folder = Path(file.source).parent
    if (folder / TRANSFORMERS_CONFIG).exists():
        return _from_folder(f"{FOLDER}{folder}", options, typed_model, file.source, file.state)
    if not typed_model:
        raise UserError(
            f"{file.source} holds a model of transformers, but there is no {TRANSFORMERS_CONFIG} beside it; put it "
            "there, or give the model as --vision_model"
        )
    return None


def _from_checkpoint(file: Weights, options: ModelOptions, typed_model: bool) -> ModelSource | None:
    """Find the model that a file defines, if it does; typed names must agree with it."""
    if ours := file.checkpoint:
        config, preprocess, held = ours.model_config, ours.preprocess, ours.options["vision_model"]
    elif infer := file.family.infer:
        with translate_errors(f"{file.source} {UNKNOWN_WEIGHTS}"):
            held, config = infer(file.state, file.source)
            config_schema.model_config(config, "")
        preprocess = find_preprocess(file.family.preprocess)
    else:
        return None
    _refuse_text_pretrained(options, file.source)
    held = find_family(config).config_name(config) or names.canonical(held)
    check_names(options, typed_model, config, held, file.source)
    return ModelSource(held, config, preprocess, file.source, file.state, config_from=file.source)


def _choose_family(options: ModelOptions, name: ModelName, config: Config) -> Family | None:
    """Return the family of a model whose towers start from their own weights, or None for other models."""
    family, text_model = find_family(config), options.text_model
    if text_model and text_model not in family.towers.text_models:
        by_text_model = {text: family for family in FAMILIES for text in family.towers.text_models}
        if text_model not in by_text_model:
            known = ", ".join(by_text_model)
            raise UserError(f"--text_model {text_model}: no such text tower; choose from {known}")
        family = by_text_model[text_model]
        if family.towers.pair is None or name.config not in family.towers.vision_models:
            known = ", ".join(family.towers.vision_models)
            raise UserError(f"--text_model {text_model} goes with --vision_model {known}, not with {name.name}")
    if family.towers.text_models and (text_model or not family.towers.pair):
        return family
    if _text_pretrained(options):
        raise UserError(f"--text_pretrained {options.text_pretrained} needs --text_model; give the name of the tower")
    return None


def _combine_towers(source: ModelSource, family: Family, options: ModelOptions, name: ModelName) -> ModelSource:
    """Start the image tower from the weights of `source`, the text tower from those of --text_pretrained."""
    towers, config = family.towers, source.config
    if towers.pair and options.text_model and not family.is_config(config):
        config = towers.pair(name.config, options.text_model)
        name_of_pair = family.config_name(config) or source.name
        source = replace(source, name=name_of_pair, preprocess=find_preprocess(family.preprocess))
    image = towers.vision_weights(source.state or {})
    if source.state and not image:
        raise UserError(
            f"--pretrained {source.weights} holds no image tower of {name.name}; give {towers.vision_source}"
        )
    text: State = {}
    if place := _text_pretrained(options):
        text = read_text_tower(place, towers.text_weights, towers.text_kind, config["text_cfg"]["hf_config"])
    if not image and not text:
        return replace(source, config=config, state=None, weights=NO_WEIGHTS, is_known=False)
    return replace(
        source,
        config=config,
        state=image | text,
        weights=f"{source.weights} for images, {place or NO_WEIGHTS} for captions",
        random=("visual.head." if image else "visual.", "text.proj." if text else "text.", "logit_scale"),
        is_known=False,
    )


def _refuse_text_pretrained(options: ModelOptions, source: str) -> None:
    if _text_pretrained(options):
        raise UserError(f"{source} has the weights of its text tower; drop --text_pretrained")


def _text_pretrained(options: ModelOptions) -> str | None:
    return None if options.text_pretrained == NO_WEIGHTS else options.text_pretrained


def check_names(options: ModelOptions, typed_model: bool, config: Config, held: str, source: str) -> None:
    """Raise UserError if typed names contradict a checkpoint.

    Args:
        options: --vision_model (used only if `typed_model`) and --text_model.
        config: the model config in the checkpoint.
        held: the model's name in the checkpoint.
        source: the checkpoint's file.
    """
    family = find_family(config)
    name = names.resolve(options.vision_model) if typed_model else None
    held = names.canonical(held)
    if name and held not in (name.name, name.config):
        typed = find_model_config(name)[0]
        # --vision_model names only the image tower of a pair
        is_pair = family.towers.pair is not None
        towers = ("vision_cfg",) if is_pair else ("vision_cfg", "text_cfg")
        same = all(same_tower(typed[tower], config[tower]) for tower in towers)
        if not same or not (is_pair or typed["embed_dim"] == config["embed_dim"]):
            other = "another model" if held.startswith((HUB, FOLDER)) else f"a {family.config_name(config) or held}"
            raise UserError(
                f"--vision_model {name.name} contradicts {source}, which holds {other}; drop --vision_model, or give "
                "another checkpoint"
            )
    text_model = config["text_cfg"].get("hf_model_name") or next(iter(family.towers.text_models), None)
    if options.text_model not in (None, text_model):
        holds = f", which holds {text_model}" if text_model else ""
        raise UserError(f"--text_model {options.text_model} contradicts {source}{holds}; drop --text_model")
