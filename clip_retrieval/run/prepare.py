"""Prepare a finetune: its data, model and trainer, new or restored from a checkpoint."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_retrieval.classification.labelled_sets import OptionNames, ZeroShotData
from clip_retrieval.classification.task import ZeroShotTask, prepare_task
from clip_retrieval.data.batches.loader import Loader
from clip_retrieval.data.batches.sampler import Sampler
from clip_retrieval.data.batches.split import Split
from clip_retrieval.data.batches.train_split import EncodeFrozen, IndexedTrainSplit, TrainSplit
from clip_retrieval.data.batches.word_dropout import WordDropout
from clip_retrieval.data.captions import Tokens, padding_id
from clip_retrieval.data.catalog import is_streamed, skips_unreadable
from clip_retrieval.data.dataset import UNSPLIT, RetrievalDataset
from clip_retrieval.data.pixels.pixels import Pixels
from clip_retrieval.data.shards.train_split import open_stream
from clip_retrieval.device import choose_device, choose_precision, device_name
from clip_retrieval.distributed import Processes
from clip_retrieval.errors import UserError, format_counts
from clip_retrieval.evaluation.protocols import check_protocols
from clip_retrieval.log import log, log_to_file
from clip_retrieval.losses import LOSSES
from clip_retrieval.models.batch_norm import share_statistics
from clip_retrieval.models.build import BuiltModel
from clip_retrieval.models.checkpoint import Checkpoint
from clip_retrieval.models.drop_path import set_drop_path
from clip_retrieval.models.grad_checkpointing import enable_grad_checkpointing
from clip_retrieval.models.lora import LoraSettings
from clip_retrieval.models.names import NO_WEIGHTS
from clip_retrieval.models.patch_dropout import set_patch_dropout
from clip_retrieval.models.towers import RetrievalModel, can_compile
from clip_retrieval.models.trainable import FROZEN_TOWERS, set_trainable, text_is_frozen, vision_is_frozen
from clip_retrieval.options import DataOptions, EvalOptions, LossOptions, Options, TrainOptions
from clip_retrieval.reporting.metrics_log import MetricsLog
from clip_retrieval.reporting.results import write_options
from clip_retrieval.reporting.trackers import parse_trackers
from clip_retrieval.run.folder import FolderLock, clear_run, without_resume
from clip_retrieval.run.model import load_model, record_model_name
from clip_retrieval.run.splits import log_samples, make_split, read_split
from clip_retrieval.run.teacher import START, copy_start, load_teacher
from clip_retrieval.signals import StopSignal
from clip_retrieval.training.collapse import CollapseWatch
from clip_retrieval.training.distillation import Distillation
from clip_retrieval.training.frozen import encode_frozen_images, encode_frozen_texts
from clip_retrieval.training.schedule import Schedule
from clip_retrieval.training.state import Progress, restore_training
from clip_retrieval.training.trainer import Trainer

FINETUNING_LR = 1e-5  # with random weights, a rate up to this one gets a warning
COMPILED_LENGTHS = 16  # caption lengths of a compiled text tower are multiples of this


@dataclass
class Run:
    """The state of a finetune.

    Attributes:
        options: the options of the run.
        folder: its output folder.
        lock: the lock on the folder; None except in the main process.
        stop: records stop signals.
        built: config, name and source of the model.
        model: the model, on its device.
        trainer: loss and optimizer.
        sampler: the order of the global batches.
        loader: the batches of this process.
        val, test: the splits to score, if any.
        zero_shot: the zero-shot classification, if any.
        retention: the split of --retention_dataset, if any.
        schedule: at which steps to log, save and evaluate.
        progress: steps and results so far.
        metrics: metrics.jsonl and TensorBoard; None except in the main process.
        processes: the process group.
        collapse: checks the loss for collapse; None for losses without a known chance value.
    """

    options: Options
    folder: Path
    lock: FolderLock | None
    stop: StopSignal
    built: BuiltModel
    model: RetrievalModel
    trainer: Trainer
    sampler: Sampler
    loader: Loader
    val: Split | None
    test: Split | None
    zero_shot: ZeroShotTask | None
    retention: Split | None
    schedule: Schedule
    progress: Progress
    metrics: MetricsLog | None
    processes: Processes
    collapse: CollapseWatch | None

    def describe_batch(self) -> str:
        """Describe the global batch as processes x pairs each: `1024 = 8 x 128`."""
        batch_size, processes = self.sampler.batch_size, self.processes.world_size
        return f"{batch_size} = {processes} x {batch_size // processes}"


def prepare(
    options: Options,
    checkpoint: Checkpoint | None,
    folder: Path,
    lock: FolderLock | None,
    stop: StopSignal,
    processes: Processes,
) -> Run:
    """Load the model and the data, restore the training state, and open the run folder.

    With --overwrite, the run that is in the folder is deleted first.

    `lock` is the main process's lock on `folder`; None in the others.
    """
    # model and data
    device = choose_device(options.run.device)
    precision = choose_precision(options.train.precision, device)
    if options.train.compile and not can_compile(device):
        options = replace(options, train=replace(options.train, compile=False))
    encodes_once = encodes_images_once(options.data, options.train)
    datasets = read_datasets(options.data, device, processes, decode_all=encodes_once)  # the model may be a download
    if reported := datasets.get("test", datasets.get("val")):
        check_protocols(options.evaluation.protocols, reported)
    torch.manual_seed(options.train.seed)
    with processes.main_first():  # it may download
        model, built, tokenizer = load_model(options, checkpoint)
    options = record_model_name(options, built)
    with processes.main_first() if options.data.image_cache else nullcontext():  # it may build the cache
        train, val, test = load_data(
            options.data,
            datasets,
            tokenizer,
            built.preprocess,
            seed=options.train.seed,
            device=device,
            processes=processes,
        )
    with processes.main_first():  # it may extract an archive
        zero_shot = load_zero_shot(
            options.evaluation, options.data.parts()[0].dataset_root, tokenizer, built.preprocess
        )
    retention = load_retention(options, tokenizer, built.preprocess, device, processes)
    if val is None and (options.train.patience or options.evaluation.retention_weight):
        name = "patience" if options.train.patience else "retention_weight"
        raise UserError(f"--{name} needs a val split; --val_fraction 0.1 holds out a tenth of the images")

    # trainer, new or restored
    sampler = train.make_sampler(choose_batch_size(options.train.batch_size, train, processes))
    trainer = make_trainer(options.train, options.loss, model.to(device), precision, device, processes)
    progress = Progress(weights=built.weights)
    if checkpoint is not None:
        progress = restore_training(
            checkpoint,
            trainer,
            sampler,
            reset_optimizer=options.run.reset_optimizer,
            reset_data_offset=options.run.reset_data_offset,
        )
        progress.weights = progress.weights or built.weights
    source = checkpoint.path.parent if checkpoint is not None else folder
    if options.loss.distill_from:
        teacher = load_teacher(
            options,
            model,
            tokenizer,
            resumed=source if progress.step else None,
            precision=precision,
            device=device,
        )
        loss = options.loss
        trainer.distillation = Distillation(teacher, loss.distill_kind, loss.distill_weight, processes)
    encode_frozen = None
    if not options.train.no_feature_cache and not options.loss.distill_from:  # the teacher sees pixels and tokens
        encode_frozen = make_frozen_encoder(
            model,
            options.evaluation.eval_batch_size,
            precision,
            device,
            processes,
            images_vary=options.data.augment != "none",
            texts_vary=options.data.word_dropout > 0,
        )
    loader: Loader = train.make_loader(
        sampler,
        trim=model.trims_text,
        bucket=COMPILED_LENGTHS if options.train.compile else 1,
        device=device,
        processes=processes,
        encode_frozen=encode_frozen,
    )
    if options.data.word_dropout:
        loader = WordDropout(
            loader,
            options.data.word_dropout,
            pad=padding_id(tokenizer),
            seed=options.train.seed,
            processes=processes,
        )

    # folder: no UserError is raised after this, so it is safe to delete a run that --overwrite replaces
    if options.run.overwrite and processes.is_main:
        clear_run(folder)
    if progress.best is not None and not has_best(source, (progress.best["step"], progress.step)):
        log.warning("best.pt is missing beside the resumed checkpoint: the best is chosen again")
        progress.best = None
    metrics = None
    if processes.is_main:
        log_to_file(folder)
        if progress.best is not None:
            copy_best(source, folder)
        if options.loss.distill_from == START and progress.step:
            copy_start(source, folder)
        recorded = without_resume(options, folder)
        write_options(folder, recorded, f"{device} ({device_name(device)})")
        metrics = MetricsLog(folder, progress.kept_lines(), parse_trackers(options.run.report_to), recorded.flat())

    # run
    schedule = Schedule.from_options(options, len(sampler))
    run = Run(
        options=options,
        folder=folder,
        lock=lock,
        stop=stop,
        built=built,
        model=model,
        trainer=trainer,
        sampler=sampler,
        loader=loader,
        val=val,
        test=test,
        zero_shot=zero_shot,
        retention=retention,
        schedule=schedule,
        progress=progress,
        metrics=metrics,
        processes=processes,
        collapse=CollapseWatch(sampler.batch_size) if LOSSES[options.loss.loss].detects_collapse else None,
    )
    if (warmup := options.train.warmup) is not None and warmup > schedule.total_steps:
        steps = format_counts(step=schedule.total_steps)
        log.warning(f"--warmup {warmup:g} is longer than the run: it becomes {steps}")
    if built.weights == NO_WEIGHTS and options.train.lr <= FINETUNING_LR:
        log.warning(f"--lr {options.train.lr:g} is for finetuning, but the weights are random: 5e-4 is a usual start")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    log.info(
        f"{trainable:,.2f} M trainable parameters; {format_counts(step=schedule.total_steps)}, {len(sampler):,} an "
        f"epoch, of {run.describe_batch()} pairs, {precision} on {device}"
    )
    return run


def encodes_images_once(data: DataOptions, train: TrainOptions) -> bool:
    """Whether every training image is decoded once, before the first step: for its cache, or by a frozen tower."""
    is_frozen = train.freeze_vision or train.trainable in FROZEN_TOWERS
    return bool(data.image_cache) or (is_frozen and not train.no_feature_cache)


def read_datasets(
    data: DataOptions, device: torch.device, processes: Processes, *, decode_all: bool
) -> dict[str, RetrievalDataset]:
    """Read the train, val and test splits, as far as they exist; of a streamed data set, none.

    A data set without splits is used for training only. `decode_all` is `read_split`'s, for the train split.
    """
    datasets: dict[str, RetrievalDataset] = {}
    if not is_streamed(data):
        decode_all = decode_all and len(data.parts()) == 1
        train = read_split(data, "train", device, processes, decode_all=decode_all)
        if train is None:
            raise UserError(f"{data.name} in {data.place} has no train split; give a data set with one")
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
        log_samples(split.dataset)
        train = IndexedTrainSplit(
            split,
            data.caption_sampling,
            seed,
            weights=data.dataset_weights if len(data.parts()) > 1 else None,
            num_workers=data.num_workers,
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


def make_frozen_encoder(
    model: RetrievalModel,
    batch_size: int | None,
    precision: str,
    device: torch.device,
    processes: Processes,
    *,
    images_vary: bool,
    texts_vary: bool,
) -> EncodeFrozen:
    """Return a function that encodes a split with the frozen towers, unless its images or texts vary."""

    def encode_frozen(split: Split, num_workers: int) -> tuple[Pixels | Tensor, Tokens | Tensor]:
        images: Pixels | Tensor = split.pixels
        texts: Tokens | Tensor = split.tokens
        encoding: dict[str, Any] = {
            "batch_size": batch_size,
            "precision": precision,
            "device": device,
            "processes": processes,
        }
        if vision_is_frozen(model) and not images_vary:
            log.info("the image tower is frozen: all images are encoded once, before the first step")
            images = encode_frozen_images(model, split.pixels, num_workers=num_workers, **encoding)
        if text_is_frozen(model) and not texts_vary:
            log.info("the text tower is frozen: all captions are encoded once, before the first step")
            texts = encode_frozen_texts(model, split.dataset, split.tokens, **encoding)
        return images, texts

    return encode_frozen


def make_trainer(
    options: TrainOptions,
    loss_options: LossOptions,
    model: RetrievalModel,
    precision: str,
    device: torch.device,
    processes: Processes,
) -> Trainer:
    """Set the trainable parameters and make the loss and the optimizer."""
    # trainable parameters
    loss = LOSSES[loss_options.loss]
    if processes.world_size > 1 and not (options.freeze_vision or options.trainable in FROZEN_TOWERS):
        model.clip.visual = share_statistics(model.clip.visual, device)  # may replace modules, so it comes first
    set_trainable(
        model,
        options.trainable,
        freeze_vision=options.freeze_vision,
        freeze_text=options.freeze_text,
        unlocked_image_blocks=options.unlocked_image_blocks,
        unlocked_text_blocks=options.unlocked_text_blocks,
        lora=LoraSettings(
            options.lora_rank, options.lora_alpha, options.lora_dropout, options.lora_targets, options.seed
        ),
        learn_scale=loss.learns_scale and loss_options.temperature is None,
        learn_bias=loss.learns_bias,
    )
    # how the towers are computed
    if options.drop_path:
        set_drop_path(model.clip, options.drop_path)
    if options.patch_dropout:
        if vision_is_frozen(model):
            raise UserError("--patch_dropout: the image tower is frozen; drop it, or train the tower")
        set_patch_dropout(model.clip.visual, options.patch_dropout)
    if loss_options.temperature is not None:
        model.clip.logit_scale.data.fill_(-math.log(loss_options.temperature))
    if options.grad_checkpointing:
        enable_grad_checkpointing(model.clip)
    if device.type == "cuda":
        model.clip.visual.to(memory_format=torch.channels_last)  # the fastest layout for convolutions
    return Trainer(
        model,
        loss_options,
        options,
        precision=precision,
        device=device,
        processes=processes,
    )


def has_best(source: Path, steps: tuple[int, ...]) -> bool:
    """Whether best.pt in `source` was saved at one of these steps."""
    return (source / "best.pt").is_file() and Checkpoint.load(source / "best.pt").step in steps


def copy_best(source: Path, folder: Path) -> None:
    """Copy best.pt from `source` to `folder` if the folders differ."""
    if source.resolve() != folder.resolve():
        Checkpoint.load(source / "best.pt").save(folder / "best.pt")
