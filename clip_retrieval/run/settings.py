"""The options of a run, settled from defaults, --config, the checkpoint and the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_retrieval.classification.labelled_sets import NAMES as ZERO_SHOT_NAMES
from clip_retrieval.classification.templates import SETS as TEMPLATE_SETS
from clip_retrieval.config import read_config
from clip_retrieval.data.catalog import SHARDED, infer_dataset, is_streamed
from clip_retrieval.data.images.decode import limit_image_pixels
from clip_retrieval.data.shards.find import absolute_patterns
from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.models.checkpoint import Checkpoint
from clip_retrieval.models.chinese_clip import UNNAMED, split_model_name
from clip_retrieval.models.source import check_names
from clip_retrieval.options import (
    AUTO,
    BELONGING,
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


def settle_options(typed: dict[str, Any], config: dict[str, Any] | None = None) -> tuple[Options, Checkpoint | None]:
    """Settle the options of a run: defaults < --config < the checkpoint's options < the command line.

    A --resume that is no checkpoint of ours gives initial weights, as --pretrained does.

    Args:
        typed: the options of the command line, by name.
        config: those of --config, if it has been read already.

    Returns:
        The options, and the checkpoint of ours that --resume names, if any.
    """
    config = read_config(typed.get("config")) if config is None else dict(config)
    options, checkpoint = _settle_with_checkpoint(typed, config)
    limit_image_pixels(options.data.max_image_pixels)
    return options, checkpoint


def _settle_with_checkpoint(typed: dict[str, Any], config: dict[str, Any]) -> tuple[Options, Checkpoint | None]:
    # defaults, --config and the command line: bad values are refused before any file is read
    for name in ONLY_TYPED:
        if config.pop(name, False):
            log.warning(f"--config {typed['config']}: {name} counts only on the command line")
    options = settle(config, typed, complete=False)
    _refuse_lists_for_one(options, config, typed)
    path = _resumed_file(options)
    if path is None:
        return _mark_given(settle(config, typed), config, typed), None

    # the checkpoint of --resume
    checkpoint = Checkpoint.load(path)
    started_from = checkpoint.options.get("pretrained") if checkpoint else None  # a command may be repeated
    if typed.get("pretrained") not in (None, str(path), started_from):
        raise UserError(f"--resume {path} and --pretrained {typed['pretrained']} both give weights; drop one of them")
    if checkpoint is None:
        log.info(f"{path} is not a checkpoint of this tool: its weights are taken, as --pretrained takes them")
        options = settle(config, typed, {"pretrained": str(path), "resume": None})
        return _mark_given(options, config, typed), None
    stored = checkpoint.options
    named = split_model_name(options.model)
    check_names(named, "vision_model" in typed, checkpoint.model_config, stored["vision_model"], str(path))

    # its options, except those that the command line replaces
    taken = select_for_resume(stored)
    if checkpoint.model_config["text_cfg"].get("vocab"):
        taken["tokenizer"] = None  # the checkpoint holds the vocabulary
    if "dataset_root" in typed:
        taken = {name: value for name, value in taken.items() if name not in PLACES}
    if "epochs" in typed:
        taken.pop("max_steps", None)  # it would decide the length of the run
    options = settle(config, taken, typed, {"resume": str(path)})
    return replace(options, given=frozenset(typed)), checkpoint


def settle(*layers: dict[str, Any], complete: bool = True) -> Options:
    """Make options from layers of flat dicts; a later layer decides.

    Raises UserError on a bad value and, if the layers are `complete`, on options that exclude each other.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        # the data set, if only the files of one are given
        implied = infer_dataset(layer)
        known = ["webdataset" if name in SHARDED else name for name in as_tuple(merged.get("dataset"))]
        # ("chinese" is a guess: missing shards look like its files.)
        if implied and implied not in known and not (implied == "chinese" and "webdataset" in known):
            layer = {"dataset": implied} | layer
        # options of another data set than that of the layers below do not belong to it
        for name, belonging in BELONGING.items():
            if merged.get(name) is not None and layer.get(name, merged[name]) != merged[name]:
                merged = {other: value for other, value in merged.items() if other not in belonging}
        merged.update(layer)
    if len(as_tuple(merged.get("dataset"))) == 1:  # an option typed twice for one data set: the last counts
        repeated = [name for name in REPEATABLE if isinstance(merged.get(name), (list, tuple))]
        merged |= {name: merged[name][-1] for name in repeated}
    options = Options.from_flat(merged)
    if complete:
        check_combinations(options)
    return options


def check_combinations(options: Options) -> None:
    """Raise UserError for options that exclude each other."""
    data, train = options.data, options.train
    for part in data.parts():
        for name in PREFIXES:
            if getattr(part, name) and part.name not in ("chinese", *SHARDED):
                raise UserError(f"--{name} is for --dataset chinese and webdataset; drop it, or --dataset {part.name}")
    if data.train_num_samples and not is_streamed(data):
        raise UserError(f"--train_num_samples is for --dataset webdataset alone; drop it, or --dataset {data.name}")
    if data.image_cache and is_streamed(data) and not options.run.eval:
        raise UserError(f"--image_cache is not for --dataset {data.name}, whose images are a stream; drop it")
    if train.grad_cache and train.accum_freq > 1:
        raise UserError("--grad_cache and --accum_freq set the same thing; give one of them")
    if train.freeze_vision and train.freeze_text and train.trainable != "adaptor":
        raise UserError("--freeze_vision and --freeze_text together leave nothing to train; drop one of them")
    if not options.evaluation.zero_shot_eval:
        for name in BELONGING["zero_shot_eval"]:
            if getattr(options.evaluation, name):
                also = " (--imagenet_eval_steps)" if name == "zero_shot_steps" else ""
                raise UserError(f"--{name}{also} needs --zero_shot_eval DATA or --imagenet_eval")
    if options.run.overwrite and options.run.resume == AUTO:
        raise UserError("--overwrite and --resume auto contradict each other; drop one of them")


def _refuse_lists_for_one(options: Options, config: dict[str, Any], typed: dict[str, Any]) -> None:
    """A list in a config is for a mixture. (Of what is typed twice the last counts: so one changes a recipe.)"""
    if len(options.data.dataset) > 1:
        return
    for name in REPEATABLE:
        listed = as_tuple(config.get(name))
        number, cut = len(listed), listed[-1] is not None and getattr(options.data, name) == listed[-1]
        if number > 1 and name not in typed and cut:
            raise UserError(
                f"--config {typed['config']}: {name} has {number} values, one for each dataset of a mixture, but there "
                "is one; several shards are one value, with blanks between them"
            )


def _mark_given(options: Options, *layers: dict[str, Any]) -> Options:
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
