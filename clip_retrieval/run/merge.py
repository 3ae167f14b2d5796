"""Merge layers of options, and check them without loading torch, which takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clip_retrieval.config import read_preset
from clip_retrieval.data.catalog import SHARDED, check_name, infer_dataset
from clip_retrieval.data.readers.karpathy import FLICKR
from clip_retrieval.data.shards.find import expand_patterns
from clip_retrieval.errors import UserError
from clip_retrieval.files import check_root, path_exists
from clip_retrieval.models.names import OPENAI_NAMES, UNNAMED, resolve
from clip_retrieval.options import (
    ALTERNATIVES,
    BELONGING,
    DETAILS,
    PREFIXES,
    REPEATABLE,
    DatasetOptions,
    Options,
    as_tuple,
)
from clip_retrieval.reporting.trackers import parse_trackers
from clip_retrieval.run.combinations import check_combinations
from clip_retrieval.run.folder import refuse_another_run, run_folder

COMMAND_LINE_ONLY = ("overwrite", "reset_optimizer", "reset_data_offset")  # a repeated command must not repeat these


def check_early(typed: dict[str, Any], config: dict[str, Any]) -> None:
    """Raise UserError for faults that show before torch is loaded: values, names, folders.

    Args:
        typed: the options of the command line, by name.
        config: the options of --config.
    """
    repeated = {name: value for name, value in config.items() if name not in COMMAND_LINE_ONLY}
    options = settle(read_preset(config, typed), repeated, typed, complete=False)
    if not options.run.eval:
        parse_trackers(options.run.report_to)
    if options.run.resume is not None:
        return  # the checkpoint has further options, which may need or fit these
    check_combinations(options)
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
        check_beside(options)
        refuse_another_run(run_folder(options.run), options.run, options.model.pretrained, can_resume=False)


def check_beside(options: Options) -> None:
    """Raise UserError if the data of --retention_dataset or the teacher of --distill_from is missing."""
    name, root = options.evaluation.retention_dataset, options.evaluation.retention_root
    teacher = options.loss.distill_from
    if name is not None:
        check_name(name, "--retention_dataset")
        if root is not None and not Path(root).is_dir():
            raise UserError(f"--retention_root {root}: no such folder; give the folder of --retention_dataset")
    if teacher and teacher != "start" and "@" not in teacher and not path_exists(teacher):
        try:
            resolve(teacher)
        except UserError as error:
            raise UserError(f"--distill_from {teacher}: no such file, and as a model: {error}") from None


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
        # drop the details of an option that this layer turns off
        for name, details in DETAILS.items():
            if layer.get(name, True) in (None, "none", 0):
                merged = {other: value for other, value in merged.items() if other not in details}
        # an option replaces its alternative in the layers below
        for pair in ALTERNATIVES:
            if len(own := layer.keys() & set(pair)) == 1:
                merged = {other: value for other, value in merged.items() if other not in pair or other in own}
        merged.update(layer)
    if len(as_tuple(merged.get("dataset"))) == 1:  # a duplicate option for one data set: the last value counts
        repeated = [name for name in REPEATABLE if isinstance(merged.get(name), (list, tuple))]
        merged |= {name: merged[name][-1] for name in repeated}
    options = Options.from_flat(merged)
    if complete:
        check_combinations(options)
    return options
