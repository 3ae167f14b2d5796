"""Merge the options of a run from defaults, --preset, --config, the checkpoint and the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_retrieval.classification.labelled_sets import NAMES as ZERO_SHOT_NAMES
from clip_retrieval.classification.templates import SETS as TEMPLATE_SETS
from clip_retrieval.config import read_config, read_preset
from clip_retrieval.data.images.decode import limit_image_pixels
from clip_retrieval.data.shards.find import absolute_patterns
from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.models.checkpoint import Checkpoint, TrainingCheckpoint
from clip_retrieval.models.chinese_clip import split_model_name
from clip_retrieval.models.names import UNNAMED
from clip_retrieval.models.source import check_names
from clip_retrieval.options import (
    AUTO,
    PLACES,
    PREFIXES,
    REPEATABLE,
    DataOptions,
    Options,
    RunOptions,
    as_tuple,
    select_for_resume,
)
from clip_retrieval.run.folder import run_folder
from clip_retrieval.run.merge import COMMAND_LINE_ONLY, settle

PATHS: tuple[str, ...] = ("dataset_root", "annotations", "image_dir", "tokenizer", "distill_from")
PATHS += ("zero_shot_eval", "zero_shot_root", "zero_shot_class_names", "zero_shot_templates", "retention_root")
KNOWN_NAMES = {
    "zero_shot_eval": ZERO_SHOT_NAMES,
    "zero_shot_templates": tuple(TEMPLATE_SETS),
    "distill_from": ("start",),
}  # names take precedence over folders


def settle_options(typed: dict[str, Any], config: dict[str, Any] | None = None) -> tuple[Options, Checkpoint | None]:
    """Merge the options of a run: defaults < --preset < --config < the checkpoint < the command line.

    If --resume is not a checkpoint of this tool, it gives the initial weights, like --pretrained.

    Args:
        typed: the options of the command line, by name.
        config: the options of --config, if already read.

    Returns:
        The options, and the checkpoint of --resume if there is one.
    """
    config = read_config(typed.get("config")) if config is None else dict(config)
    options, checkpoint = _merge_with_checkpoint(typed, config)
    limit_image_pixels(options.data.max_image_pixels)
    return options, checkpoint


def _merge_with_checkpoint(typed: dict[str, Any], config: dict[str, Any]) -> tuple[Options, Checkpoint | None]:
    # defaults, --preset, --config and the command line: raise on bad values before any file is read
    for name in COMMAND_LINE_ONLY:
        if config.pop(name, False):
            log.warning(f"--config {typed['config']}: {name} counts only on the command line")
    preset = read_preset(config, typed)
    options = settle(preset, config, typed, complete=False)
    _check_lists(options.data, config, typed)
    path = _find_checkpoint(options.run)
    if path is None:
        return _mark_given(settle(preset, config, typed), config, typed), None

    # the checkpoint of --resume
    checkpoint = Checkpoint.load_if_ours(path)
    # repeating the first run's command is valid, with its --pretrained
    initial = checkpoint.options.get("pretrained") if checkpoint else None
    if typed.get("pretrained") not in (None, str(path), initial):
        raise UserError(f"--resume {path} and --pretrained {typed['pretrained']} both give weights; drop one of them")
    if checkpoint is None:
        log.info(f"{path} is not a checkpoint of this tool: its weights start a new run, like --pretrained")
        options = settle(preset, config, typed, {"pretrained": str(path), "resume": None})
        return _mark_given(options, config, typed), None
    stored = checkpoint.options
    named = split_model_name(options.model)
    check_names(named, "vision_model" in typed, checkpoint.model_config, stored["vision_model"], str(path))

    # the checkpoint's options, except those that the command line replaces
    inherited = {"optimizer": "adamw"} | select_for_resume(stored)  # earlier versions had no other one
    if checkpoint.model_config["text_cfg"].keys() & {"vocab", "tokenizer_files"}:
        inherited["tokenizer"] = None  # the checkpoint holds it
    if "dataset_root" in typed:
        inherited = {name: value for name, value in inherited.items() if name not in PLACES}
    if "epochs" in typed:
        inherited.pop("max_steps", None)  # it would override epochs
    options = settle(preset, config, inherited, typed, {"resume": str(path)})

    # a run's last.pt continues in its folder
    given = {**config, **typed}
    continues = isinstance(checkpoint, TrainingCheckpoint) and not (options.run.eval or options.run.reset_data_offset)
    if continues and "experiments" not in given:
        place = _find_run(path)
        if "checkpoint_path" in given:
            place.pop("checkpoint_path", None)
        options = replace(options, run=replace(options.run, **place))
    return replace(options, given=frozenset(typed)), checkpoint


def _find_run(path: Path) -> dict[str, Any]:
    """Return the options of the run folder whose last.pt `path` is; empty if it is another file."""
    folder = path.parent if path.parent.name not in ("", "..") else path.resolve().parent
    if path.name != "last.pt" or not (folder / "options.json").is_file():
        return {}
    return {"checkpoint_path": str(folder.parent), "experiments": folder.name}


def _check_lists(data: DataOptions, config: dict[str, Any], typed: dict[str, Any]) -> None:
    """Raise UserError if a config gives one data set a list of values, which is for a mixture.

    A repeated option on the command line is valid: its last value counts, to change a stored command.
    """
    if len(data.dataset) > 1:
        return
    for name in REPEATABLE:
        listed = as_tuple(config.get(name))
        number, is_cut = len(listed), listed[-1] is not None and getattr(data, name) == listed[-1]
        if number > 1 and name not in typed and is_cut:
            raise UserError(
                f"--config {typed['config']}: {name} has {number} values, one for each dataset of a mixture, but there "
                "is one; write several shards as one value, separated by blanks"
            )


def _mark_given(options: Options, *layers: dict[str, Any]) -> Options:
    """Return the options of a run without a checkpoint, with the names of the options that the user gave."""
    given = frozenset().union(*layers)
    if options.model.vision_model == UNNAMED:  # options.json of a model that only its weight file names
        return replace(options, model=replace(options.model, vision_model="ViT-B/32"), given=given - {"vision_model"})
    return replace(options, model=split_model_name(options.model), given=given)


def _find_checkpoint(options: RunOptions) -> Path | None:
    if options.resume is None:
        return None
    if options.resume != AUTO:
        return Path(options.resume)
    last = run_folder(options) / "last.pt"
    if last.is_file():
        return last
    if options.eval:
        raise UserError(f"--resume auto: there is no {last}; give the checkpoint's path")
    return None


def with_absolute_paths(flat: dict[str, Any]) -> dict[str, Any]:
    """Make the paths of a checkpoint's options absolute, to find the data from any working directory."""
    paths = [name for name in PATHS if flat[name] not in KNOWN_NAMES.get(name, ())]
    absolute = {name: _map_value(flat[name], _absolute_if_exists) for name in paths}
    return flat | absolute | {name: _map_value(flat[name], absolute_patterns) for name in PREFIXES}


def _map_value(value: Any, change: Callable[[str], str]) -> Any:
    """Apply a function to the value of an option, or to each value of a tuple; None stays."""
    if isinstance(value, tuple):
        return tuple(_map_value(item, change) for item in value)
    return value and change(value)


def _absolute_if_exists(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).exists() else path
