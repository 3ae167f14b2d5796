"""Merge layers of options, and check them without loading torch, which takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clip_retrieval.config import read_preset
from clip_retrieval.data.catalog import SHARDED, check_name, infer_dataset, is_streamed
from clip_retrieval.data.readers.karpathy import FLICKR
from clip_retrieval.data.shards.find import expand_patterns
from clip_retrieval.errors import UserError
from clip_retrieval.files import check_root
from clip_retrieval.losses import LOSSES
from clip_retrieval.models.names import OPENAI_NAMES, UNNAMED, resolve
from clip_retrieval.options import (
    AUTO,
    BELONGING,
    PREFIXES,
    REPEATABLE,
    DataOptions,
    DatasetOptions,
    LossOptions,
    Options,
    TrainOptions,
    as_tuple,
)
from clip_retrieval.reporting.trackers import parse_trackers
from clip_retrieval.run.folder import refuse_another_run, run_folder

COMMAND_LINE_ONLY = ("overwrite", "reset_optimizer", "reset_data_offset")  # a repeated command must not repeat these


def check_early(typed: dict[str, Any], config: dict[str, Any]) -> None:
    """Raise UserError for faults that show before torch is loaded: values, names, folders.

    Args:
        typed: the options of the command line, by name.
        config: the options of --config.
    """
    repeated = {name: value for name, value in config.items() if name not in COMMAND_LINE_ONLY}
    options = settle(read_preset(config, typed), repeated, typed)
    if not options.run.eval:
        parse_trackers(options.run.report_to)
    if options.run.resume is not None:
        return  # the checkpoint has further options
    name = options.model.vision_model
    if ("@" not in name or name in OPENAI_NAMES) and name != UNNAMED:  # Chinese-CLIP's names have both towers
        resolve(name)
    for part in options.data.parts():
        check_name(part.name)
        check_paths(part, evaluate=options.run.eval)
    root = options.evaluation.zero_shot_root
    if root and not Path(root).exists():
        raise UserError(f"--zero_shot_root {root}: no such folder; give the folder of the zero-shot data set")
    if not options.run.eval:
        refuse_another_run(run_folder(options.run), options.run, options.model.pretrained, can_resume=False)


def check_paths(data: DatasetOptions, *, evaluate: bool) -> None:
    """Raise UserError if a file or folder that the options of a data set name is missing.

    evaluate: the train split is not read if there is another one.
    """
    if data.annotations and not Path(data.annotations).exists():
        raise UserError(f"--annotations {data.annotations}: no such file; give the captions file")
    if data.image_dir and not Path(data.image_dir).is_dir():
        raise UserError(f"--image_dir {data.image_dir}: no such folder; give the folder of the images")
    if data.name == "shapes" or data.annotations:
        return
    if not (data.train_data or data.val_data):
        check_root(Path(data.dataset_root))
    elif data.name in SHARDED:
        for name in PREFIXES:
            if (patterns := getattr(data, name)) and not (evaluate and data.val_data and name == "train_data"):
                expand_patterns(patterns, f"--{name}")


def settle(*layers: dict[str, Any], complete: bool = True) -> Options:
    """Make options from layers of flat dicts. Later layers take precedence.

    Raises UserError if a value is invalid and, with `complete`, if options exclude each other.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        # infer the data set if only its files are given
        implied = infer_dataset(layer)
        known = ["webdataset" if name in SHARDED else name for name in as_tuple(merged.get("dataset"))]
        # "chinese" is only a guess: its files resemble missing shards. Flickr's own captions files may be CSV.
        fits = {"chinese": ("webdataset",), "csv": FLICKR}.get(implied or "", ())
        if implied and implied not in known and not any(name in fits for name in known):
            layer = {"dataset": implied} | layer
        # drop options of another data set from the layers below
        for name, belonging in BELONGING.items():
            if merged.get(name) is not None and layer.get(name, merged[name]) != merged[name]:
                merged = {other: value for other, value in merged.items() if other not in belonging}
        merged.update(layer)
    if len(as_tuple(merged.get("dataset"))) == 1:  # a duplicate option for one data set: the last value counts
        repeated = [name for name in REPEATABLE if isinstance(merged.get(name), (list, tuple))]
        merged |= {name: merged[name][-1] for name in repeated}
    options = Options.from_flat(merged)
    if complete:
        check_combinations(options)
    return options


def check_combinations(options: Options) -> None:
    """Raise UserError if options exclude each other."""
    # data
    data, train = options.data, options.train
    for part in data.parts():
        for name in PREFIXES:
            if getattr(part, name) and part.name not in ("chinese", *SHARDED):
                raise UserError(f"--{name} is for --dataset chinese and webdataset; drop it, or --dataset {part.name}")
    if data.train_num_samples and not is_streamed(data):
        raise UserError(f"--train_num_samples is only for --dataset webdataset; drop it, or --dataset {data.name}")
    if data.image_cache and is_streamed(data) and not options.run.eval:
        raise UserError(f"--image_cache is not for --dataset {data.name}, whose images are streamed; drop it")
    held_out = " and ".join(f"--{split}_fraction" for split, fraction in data.fractions.items() if fraction)
    if held_out and is_streamed(data):
        raise UserError(f"{held_out}: not for --dataset {data.name}, whose images are streamed; give --val_data")
    if held_out and len(data.dataset) > 1:
        raise UserError(f"{held_out}: not for several data sets; give the first one a val or a test split")
    if sum(data.fractions.values()) >= 1:
        raise UserError(f"{held_out} leave no images to train on; lower them")
    if data.crop_scale != DataOptions.crop_scale and data.augment == "none":
        raise UserError(f"--crop_scale {data.crop_scale:g} needs --augment crop, auto, auto_flip or rand; give both")
    # model
    if options.model.keep_positions and not options.model.context_length:
        raise UserError(f"--keep_positions {options.model.keep_positions} needs --context_length; give both")
    # training
    if train.grad_cache and train.accum_freq > 1:
        raise UserError("--grad_cache and --accum_freq set the same thing; give one of them")
    if train.freeze_vision and train.freeze_text and train.trainable != "adaptor":
        raise UserError("--freeze_vision and --freeze_text together leave nothing to train; drop one of them")
    for name in BELONGING["trainable"]:
        if train.trainable != "lora" and getattr(train, name) != getattr(TrainOptions, name):
            raise UserError(f"--{name} needs --trainable lora, not {train.trainable}; give both, or drop it")
    for name, frozen in (("unlocked_image_blocks", "freeze_vision"), ("unlocked_text_blocks", "freeze_text")):
        if getattr(train, name) is not None:
            if getattr(train, frozen):
                raise UserError(f"--{name} and --{frozen} contradict each other; drop one of them")
            if train.trainable in ("linear_projection", "adaptor"):
                raise UserError(f"--{name} has no effect with --trainable {train.trainable}; drop one of them")
    if train.decay_fraction and train.schedule != "wsd":
        raise UserError(f"--decay_fraction {train.decay_fraction:g} needs --schedule wsd; give both or drop it")
    if train.patience and not (options.evaluation.eval_every or options.evaluation.eval_steps):
        raise UserError(f"--patience {train.patience} counts evaluations, and --eval_every 0 drops them; drop one")
    if train.swa_start and not train.max_steps and train.swa_start > train.epochs:
        raise UserError(f"--swa_start {train.swa_start} is after the last epoch ({train.epochs}); lower it")
    # loss
    loss = LOSSES[options.loss.loss]
    for name in ("label_smoothing", "i2t_weight"):
        if getattr(options.loss, name) != getattr(LossOptions, name) and name not in loss.arguments:
            raise UserError(f"--{name} is not for --loss {options.loss.loss}; drop one of them")
    if options.loss.temperature and not loss.learns_scale:
        raise UserError(f"--temperature: --loss {options.loss.loss} has none; drop one of them")
    if not options.loss.distill_from:
        for name in ("distill_kind", "distill_weight"):
            if getattr(options.loss, name) != getattr(LossOptions, name):
                raise UserError(f"--{name} needs --distill_from CKPT or start; give both")
    # evaluation and the run's folder
    for name in ("rerank", "ensemble"):
        if getattr(options.evaluation, name) and not options.run.eval:
            raise UserError(f"--{name} is for --eval, after training; drop it")
    if not options.evaluation.zero_shot_eval:
        for name in BELONGING["zero_shot_eval"]:
            if getattr(options.evaluation, name):
                alias = " (--imagenet_eval_steps)" if name == "zero_shot_steps" else ""
                raise UserError(f"--{name}{alias} needs --zero_shot_eval DATA or --imagenet_eval")
    if options.evaluation.retention_root and not options.evaluation.retention_dataset:
        raise UserError("--retention_root needs --retention_dataset; give both")
    if options.evaluation.retention_weight and not options.evaluation.retention_dataset:
        if not options.evaluation.zero_shot_eval:
            raise UserError("--retention_weight needs --retention_dataset or --zero_shot_eval; give one")
        if options.evaluation.zero_shot_steps:
            raise UserError("--retention_weight scores with each val evaluation; drop --zero_shot_steps")
    if options.run.overwrite and options.run.resume == AUTO:
        raise UserError("--overwrite and --resume auto contradict each other; drop one of them")
