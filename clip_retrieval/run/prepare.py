"""Prepare a finetune: its data, model and trainer, new or restored from a checkpoint."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clip_retrieval.classification.task import ZeroShotTask
from clip_retrieval.data.batches.loader import Loader
from clip_retrieval.data.batches.sampler import Sampler
from clip_retrieval.data.batches.split import Split
from clip_retrieval.data.batches.train_split import TrainSplit
from clip_retrieval.device import choose_device, choose_precision, device_name
from clip_retrieval.distributed import Processes
from clip_retrieval.errors import UserError, format_counts
from clip_retrieval.evaluation.protocols import check_protocols
from clip_retrieval.log import log, log_to_file
from clip_retrieval.losses import LOSSES
from clip_retrieval.models.build import BuiltModel
from clip_retrieval.models.checkpoint import Checkpoint
from clip_retrieval.models.image_size import format_size, height_and_width
from clip_retrieval.models.names import NO_WEIGHTS
from clip_retrieval.models.towers import RetrievalModel, can_compile
from clip_retrieval.options import Options
from clip_retrieval.reporting.metrics_log import MetricsLog
from clip_retrieval.reporting.results import write_options
from clip_retrieval.reporting.trackers import parse_trackers
from clip_retrieval.run.folder import FolderLock, clear_run, without_resume
from clip_retrieval.run.model import load_model, record_model_name
from clip_retrieval.run.teacher import START, START_FILE, make_distillation
from clip_retrieval.run.train_data import (
    caches_image_features,
    choose_batch_size,
    encodes_images_once,
    load_data,
    load_retention,
    load_zero_shot,
    read_datasets,
)
from clip_retrieval.run.train_parts import make_loader, make_trainer
from clip_retrieval.signals import StopSignal
from clip_retrieval.training.collapse import CollapseWatch
from clip_retrieval.training.image_warmup import ImageWarmup
from clip_retrieval.training.schedule import Schedule
from clip_retrieval.training.state import Progress, restore_training
from clip_retrieval.training.trainer import Trainer

FINETUNING_LR = 1e-5  # with random weights, a rate up to this one gets a warning


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


class Loaded(NamedTuple):
    """The model and the data of a finetune; `options` name the model that was loaded."""

    options: Options
    model: RetrievalModel
    built: BuiltModel
    tokenizer: Any
    train: TrainSplit
    val: Split | None
    test: Split | None
    zero_shot: ZeroShotTask | None
    retention: Split | None


def load_model_and_data(
    options: Options, checkpoint: Checkpoint | None, device: torch.device, processes: Processes
) -> Loaded:
    """Load the model, the splits, and the data that are scored beside them. The data files are checked first."""
    # data files; the model may be a download
    datasets = read_datasets(
        options.data,
        device,
        processes,
        decode_all=encodes_images_once(options.data, options.train),
        caches_features=caches_image_features(options.train),
    )
    if reported := datasets.get("test", datasets.get("val")):
        check_protocols(options.evaluation.protocols, reported)

    # model
    torch.manual_seed(options.train.seed)
    with processes.main_first():  # it may download
        model, built, tokenizer = load_model(options, checkpoint)
    options = record_model_name(options, built)

    # splits
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
    return Loaded(options, model, built, tokenizer, train, val, test, zero_shot, retention)


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
    if options.train.compile and device.type != "cuda" and not can_compile(device):  # a GPU still gains from graphs
        options = replace(options, train=replace(options.train, compile=False))
    loaded = load_model_and_data(options, checkpoint, device, processes)
    options, model, built, tokenizer, train = loaded[:5]

    # trainer, new or restored
    sampler = train.make_sampler(choose_batch_size(options.train.batch_size, train, processes))
    schedule = Schedule.from_options(options, len(sampler))
    trainer = make_trainer(options.train, options.loss, model.to(device), precision, device, processes)
    if options.train.start_image_size:
        size = height_and_width(options.train.start_image_size)
        trainer.image_warmup = ImageWarmup(size, schedule.small_steps)
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
    trainer.distillation = make_distillation(
        options,
        model,
        tokenizer,
        train,
        resumed=source if progress.step else None,
        caches=schedule.total_steps >= len(sampler),
        precision=precision,
        device=device,
        processes=processes,
    )
    loader = make_loader(
        options,
        train,
        sampler,
        model,
        tokenizer,
        precision=precision,
        device=device,
        processes=processes,
        teacher_sees_batches=trainer.distillation is not None and trainer.distillation.features is None,
    )

    # folder: no UserError is raised after this, so it is safe to delete a run that --overwrite replaces
    if options.run.overwrite and processes.is_main:
        clear_run(folder)
    if progress.best is not None and not has_best(source, (progress.best["step"], progress.step)):
        log.warning("best.pt is missing beside the resumed checkpoint: the best is chosen again")
        progress.best = None
    metrics = open_folder(options, folder, source, progress, device) if processes.is_main else None

    # run
    detects_collapse = LOSSES[options.loss.loss].detects_collapse and not options.data.negative_column
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
        val=loaded.val,
        test=loaded.test,
        zero_shot=loaded.zero_shot,
        retention=loaded.retention,
        schedule=schedule,
        progress=progress,
        metrics=metrics,
        processes=processes,
        collapse=CollapseWatch(sampler.batch_size) if detects_collapse else None,
    )
    log_setup(run, precision)
    return run


def open_folder(options: Options, folder: Path, source: Path, progress: Progress, device: torch.device) -> MetricsLog:
    """Start the log, options.json and metrics.jsonl of the run; copy files of the run that it resumes, in `source`."""
    log_to_file(folder)
    kept = ["best.pt"] if progress.best is not None else []
    kept += [START_FILE] if options.loss.distill_from == START and progress.step else []
    for name in kept if source.resolve() != folder.resolve() else []:
        Checkpoint.load(source / name).save(folder / name)
    recorded = without_resume(options, folder)
    write_options(folder, recorded, f"{device} ({device_name(device)})")
    return MetricsLog(folder, progress.kept_lines(), parse_trackers(options.run.report_to), recorded.flat())


def log_setup(run: Run, precision: str) -> None:
    """Log the size of the run, and warn of options that do not fit it."""
    train, total_steps = run.options.train, run.schedule.total_steps
    if train.warmup is not None and train.warmup > total_steps:
        log.warning(f"--warmup {train.warmup:g} is longer than the run: it becomes {format_counts(step=total_steps)}")
    if run.built.weights == NO_WEIGHTS and train.lr <= FINETUNING_LR:
        log.warning(f"--lr {train.lr:g} is for finetuning, but the weights are random: 5e-4 is a usual start")
    trainable = sum(p.numel() for p in run.model.parameters() if p.requires_grad) / 1e6
    log.info(
        f"{trainable:,.2f} M trainable parameters; {format_counts(step=total_steps)}, {len(run.sampler):,} an "
        f"epoch, of {run.describe_batch()} pairs, {precision} on {run.trainer.device}"
    )
    if warmup := run.trainer.image_warmup:
        full = format_size(run.model.preprocess["size"])
        log.info(f"images of {format_size(warmup.size)} px to step {warmup.steps}, then of {full} px")


def has_best(source: Path, steps: tuple[int, ...]) -> bool:
    """Whether best.pt in `source` was saved at one of these steps."""
    return (source / "best.pt").is_file() and Checkpoint.load(source / "best.pt").step in steps
