"""The options of a run, settled from defaults, --config, the checkpoint and the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_retrieval.classification.labelled_sets import NAMES as ZERO_SHOT_NAMES
from clip_retrieval.classification.templates import SETS as TEMPLATE_SETS
from clip_retrieval.config import read_config
from clip_retrieval.data.images.decode import limit_image_pixels
from clip_retrieval.data.shards.find import absolute_patterns
from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.models.chinese_clip import UNNAMED, split_model_name
from clip_retrieval.models.source import check_names
from clip_retrieval.models.weights import read_checkpoint
from clip_retrieval.options import (
    AUTO,
    PLACES,
    PREFIXES,
    REPEATABLE,
    Options,
    as_tuple,
    select_for_resume,
)
from clip_retrieval.run.folder import run_folder

PATHS = ("dataset_root", "annotations", "image_dir", "tokenizer")
PATHS += ("zero_shot_eval", "zero_shot_root", "zero_shot_class_names", "zero_shot_templates")
NO_PATHS = {"zero_shot_eval": ZERO_SHOT_NAMES, "zero_shot_templates": tuple(TEMPLATE_SETS)}  # names go before folders
ONLY_TYPED = ("overwrite", "reset_optimizer", "reset_data_offset")  # what a command that is repeated would do again


def settle_options(typed: dict[str, Any]) -> tuple[Options, dict[str, Any] | None]:
    """The options of a run, and the checkpoint of ours that it resumes, if any; see `_settle`."""
    options, checkpoint = _settle(typed)
    limit_image_pixels(options.data.max_image_pixels)
    return options, checkpoint


def _settle(typed: dict[str, Any]) -> tuple[Options, dict[str, Any] | None]:
    """The options of a run, and the checkpoint of ours that it resumes, if any.

    Defaults < --config < the checkpoint's options < what was typed. A --resume that is not a checkpoint of ours gives
    the weights to start from, as --pretrained does.
    """
    config = read_config(typed.get("config"))
    for name in ONLY_TYPED:
        if config.pop(name, False):
            log.warning(f"--config {typed['config']}: {name} counts only where it is typed")
    options = Options.settle(config, typed, complete=False)  # refuses bad values before anything is read
    _refuse_lists_for_one(options, config, typed)
    path = _resumed_file(options)
    if path is None:
        return _given(Options.settle(config, typed), config, typed), None
    checkpoint = read_checkpoint(path)
    started_from = checkpoint["options"].get("pretrained") if checkpoint else None  # a command may be repeated
    if typed.get("pretrained") not in (None, str(path), started_from):
        raise UserError(f"--resume {path} and --pretrained {typed['pretrained']} both give weights; drop one of them")
    if checkpoint is None:
        log.info(f"{path} is not a checkpoint of this tool: its weights are taken, as --pretrained takes them")
        options = Options.settle(config, typed, {"pretrained": str(path), "resume": None})
        return _given(options, config, typed), None
    stored = checkpoint["options"]
    named = split_model_name(options.model)
    check_names(named, "vision_model" in typed, checkpoint["model_config"], stored["vision_model"], str(path))
    taken = select_for_resume(stored)
    if checkpoint["model_config"]["text_cfg"].get("vocab"):
        taken["tokenizer"] = None  # the checkpoint carries its words
    if "dataset_root" in typed:
        taken = {name: value for name, value in taken.items() if name not in PLACES}
    if "epochs" in typed:
        taken.pop("max_steps", None)  # it would decide the length of the run
    options = Options.settle(config, taken, typed, {"resume": str(path)})
    return replace(options, given=frozenset(typed)), checkpoint


def _refuse_lists_for_one(options: Options, config: dict[str, Any], typed: dict[str, Any]) -> None:
    """A list in a config is for a mixture. (Of what is typed twice the last counts: so one changes a recipe.)"""
    if len(as_tuple(options.data.dataset)) > 1:
        return
    for name in REPEATABLE:
        listed = as_tuple(config.get(name))
        number, cut = len(listed), listed[-1] is not None and getattr(options.data, name) == listed[-1]
        if number > 1 and name not in typed and cut:
            raise UserError(
                f"--config {typed['config']}: {name} has {number} values, one for each dataset of a mixture, but there "
                "is one; several shards are one value, with blanks between them"
            )


def _given(options: Options, *layers: dict[str, Any]) -> Options:
    """The options of a run that no checkpoint of ours decides on; they know which of them the user gave."""
    given = frozenset().union(*layers)
    if options.model.vision_model == UNNAMED:  # what options.json calls a model that its file alone tells
        return replace(options, model=replace(options.model, vision_model="ViT-B/32"), given=given - {"vision_model"})
    return replace(options, model=split_model_name(options.model), given=given)


def _resumed_file(options: Options) -> Path | None:
    resume = options.run.resume
    if resume is None:
        return None
    if resume != AUTO:
        return Path(resume)
    last = run_folder(options) / "last.pt"
    if last.is_file():
        return last
    if options.run.eval:
        raise UserError(f"--resume auto: there is no {last}; give the checkpoint's path")
    return None


def with_absolute_paths(flat: dict[str, Any]) -> dict[str, Any]:
    """Options for a checkpoint: its data are found from any working directory."""
    paths = [name for name in PATHS if flat[name] not in NO_PATHS.get(name, ())]
    absolute = {name: _each(flat[name], _absolute_if_there) for name in paths}
    return flat | absolute | {name: _each(flat[name], absolute_patterns) for name in PREFIXES}


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """The value of an option changed, or each of a tuple's; None stays."""
    if isinstance(value, tuple):
        return tuple(_each(item, change) for item in value)
    return value and change(value)


def _absolute_if_there(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).exists() else path
