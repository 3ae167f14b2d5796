"""Read the data of a finetune, and prepare them for its model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clip_retrieval.classification.labelled_sets import OptionNames, ZeroShotData
from clip_retrieval.classification.task import ZeroShotTask, prepare_task
from clip_retrieval.data.batches.split import Split
from clip_retrieval.data.batches.train_split import IndexedTrainSplit, TrainSplit
from clip_retrieval.data.catalog import is_streamed, skips_unreadable
from clip_retrieval.data.dataset import UNSPLIT, RetrievalDataset
from clip_retrieval.data.shards.train_split import open_stream
from clip_retrieval.distributed import Processes
from clip_retrieval.errors import UserError, format_counts
from clip_retrieval.log import log
from clip_retrieval.models.trainable import FROZEN_TOWERS
from clip_retrieval.options import DataOptions, EvalOptions, Options, TrainOptions
from clip_retrieval.run.splits import load_pixels, log_samples, make_split, read_split


def caches_image_features(train: TrainOptions) -> bool:
    """Whether a frozen image tower encodes the training images once, before the first step."""
    return (train.freeze_vision or train.trainable in FROZEN_TOWERS) and not train.no_feature_cache


def encodes_images_once(data: DataOptions, train: TrainOptions) -> bool:
    """Whether every training image is decoded once, before the first step: for its cache, or to encode it."""
    compares = data.hard_negatives and data.hard_negatives_by == "image"
    return bool(data.image_cache or compares or caches_image_features(train))


def read_datasets(
    data: DataOptions, device: torch.device, processes: Processes, *, decode_all: bool, caches_features: bool
) -> dict[str, RetrievalDataset]:
    """Read the train, val and test splits, as far as they exist; of a streamed data set, none.

    A data set without splits is used for training only. `decode_all` is `read_split`'s, for the train split. With
    caches_features=True, images that training would skip are left out, because the cached features need all images.
    """
    datasets: dict[str, RetrievalDataset] = {}
    if not is_streamed(data):
        decode_all = decode_all and len(data.parts()) == 1
        skips = data.skip_broken or (decode_all and caches_features and skips_unreadable(data))
        train = read_split(replace(data, skip_broken=skips), "train", device, processes, decode_all=decode_all)
        if train is None:
            raise UserError(f"{data.name} in {data.place} has no train split; give a data set with one")
        if data.negative_column and train.negatives is None:
            raise UserError(
                f"{data.name} in {data.place}: no negative caption in {data.negative_column}; name their column or "
                "key with --negative_column"
            )
        datasets["train"] = train
        if train.split == UNSPLIT:
            return datasets
        datasets |= read_held_out(data, device, processes)
    return datasets


def read_held_out(data: DataOptions, device: torch.device, processes: Processes) -> dict[str, RetrievalDataset]:
    """Read the val and the test split, as far as they exist."""
    found = {
        "val": read_split(data, "val", device, processes),
        "test": read_split(data, "test", device, processes, require_pairs=False),
    }
    return {name: dataset for name, dataset in found.items() if dataset is not None}


def load_data(
    data: DataOptions,
    datasets: dict[str, RetrievalDataset],
    tokenizer: Any,
    preprocess: dict[str, Any],
    *,
    seed: int,
    device: torch.device,
    processes: Processes,
) -> tuple[TrainSplit, Split | None, Split | None]:
    """Prepare the train, val and test splits for the model. The shards of a streamed train split are opened here."""
    # train
    train: TrainSplit | None
    if is_streamed(data):
        train = open_stream(data, seed, tokenizer, preprocess, device, processes)
        if train is None:
            raise UserError(f"{data.name} in {data.place} has no train split; give a data set with one")
        datasets = read_held_out(data, device, processes) if train.split != UNSPLIT else {}
    else:
        split = make_split(data, datasets["train"], tokenizer, preprocess, device, data.augment)
        plain = split.pixels
        if data.hard_negatives and data.augment != "none":
            plain = load_pixels(data, split.dataset, preprocess, device, "none")
        log_samples(split.dataset)
        train = IndexedTrainSplit(
            split,
            data.caption_sampling,
            seed,
            weights=data.dataset_weights if len(data.parts()) > 1 else None,
            num_workers=data.num_workers,
            plain_pixels=plain,
            hard_negatives=(data.hard_negatives, data.hard_negatives_by) if data.hard_negatives else None,
            skip_unreadable=skips_unreadable(data),
        )

    # val and test
    val, test = (
        make_split(data, datasets[name], tokenizer, preprocess, device) if name in datasets else None
        for name in ("val", "test")
    )
    warn_of_missing_splits(data, has_val=val is not None, has_test=test is not None)
    return train, val, test


def warn_of_missing_splits(data: DataOptions, *, has_val: bool, has_test: bool) -> None:
    """Warn of everything that is not measured because a split is missing."""
    remedy = "--val_data names one" if is_streamed(data) else "--val_fraction 0.1 holds out a tenth of the images"
    if not has_val and not has_test:
        log.warning(
            "there is no val split and no test split: NOTHING IS MEASURED, neither during training nor at its end, and "
            f"there will be no best checkpoint; {remedy}"
        )
    elif not has_val:
        log.warning(f"there is no val split: there will be no best checkpoint, and the last one is reported; {remedy}")
    elif not has_test:
        log.warning("there is no test split: the final results are on val")


def load_zero_shot(
    options: EvalOptions, dataset_root: str, tokenizer: Any, preprocess: dict[str, Any]
) -> ZeroShotTask | None:
    """Prepare the zero-shot classification of --zero_shot_eval, if it is given."""
    if not options.zero_shot_eval:
        return None
    data = ZeroShotData(
        options.zero_shot_eval,
        Path(options.zero_shot_root or dataset_root),
        class_names=Path(options.zero_shot_class_names) if options.zero_shot_class_names else None,
        templates=options.zero_shot_templates,
        options=OptionNames("--zero_shot_root", "--zero_shot_class_names", "--zero_shot_templates", download=None),
    )
    return prepare_task(data, tokenizer, preprocess)


def load_retention(
    options: Options, tokenizer: Any, preprocess: dict[str, Any], device: torch.device, processes: Processes
) -> Split | None:
    """Prepare the test split of --retention_dataset, or else its val split; None without the option.

    Raises UserError if it has neither.
    """
    name, root = options.evaluation.retention_dataset, options.evaluation.retention_root
    if name is None:
        return None
    shared = ("caption_prefix", "decoder", "skip_broken", "max_image_pixels", "num_workers")
    data = DataOptions(
        dataset=(name,),
        dataset_root=root or options.data.parts()[0].dataset_root,
        **{each: getattr(options.data, each) for each in shared},
    )
    for split in ("test", "val"):
        if (dataset := read_split(data, split, device, processes, require_pairs=False)) is not None:
            return make_split(data, dataset, tokenizer, preprocess, device)
    raise UserError(f"--retention_dataset {name} in {data.place} has no test and no val split; give another one")


def choose_batch_size(batch_size: int, train: TrainSplit, processes: Processes) -> int:
    """Return the batch size, for a smaller split the largest that the processes divide.

    Raises UserError if that is below two pairs.
    """
    samples = train.samples
    if samples >= batch_size:
        return batch_size
    shrunk = samples - samples % processes.world_size
    if shrunk < 2:
        raise UserError(f"the train split has {format_counts(pair=samples)}: too few for training")
    log.warning(
        f"the train split has {format_counts(pair=samples)} an epoch: --batch_size {batch_size} becomes {shrunk}"
    )
    return shrunk
