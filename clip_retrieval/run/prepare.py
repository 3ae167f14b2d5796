"""A finetune before its first step: what belongs to it, made ready or brought to where a checkpoint stood."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clip_retrieval.classification.labelled_sets import OptionNames, ZeroShotData
from clip_retrieval.classification.task import ZeroShotTask, prepare_task
from clip_retrieval.data.batches.loader import Loader, TrainLoader
from clip_retrieval.data.batches.sampler import BatchSampler, number_of_samples, process_slice
from clip_retrieval.data.dataset import UNSPLIT
from clip_retrieval.data.pixels.pixels import choose_num_workers
from clip_retrieval.data.shards.train_split import StreamedSplit, make_order, make_stream_loader, open_stream
from clip_retrieval.device import choose_device, choose_precision, device_name
from clip_retrieval.distributed import Processes
from clip_retrieval.errors import UserError
from clip_retrieval.log import MetricsLog, log, log_to_file
from clip_retrieval.losses import LOSSES
from clip_retrieval.models.batch_norm import share_statistics
from clip_retrieval.models.build import BuiltModel
from clip_retrieval.models.towers import RetrievalModel, check_compiles
from clip_retrieval.models.trainable import set_trainable, text_is_frozen, vision_is_frozen
from clip_retrieval.options import Options
from clip_retrieval.reporting.results import write_options
from clip_retrieval.run.folder import FolderLock, clear_run, copy_best, has_best, without_resume
from clip_retrieval.run.model import load_model
from clip_retrieval.run.splits import Split, load_split, log_samples
from clip_retrieval.signals import StopSignal
from clip_retrieval.training.collapse import CollapseWatch
from clip_retrieval.training.frozen import encode_frozen_images, encode_frozen_texts
from clip_retrieval.training.state import Progress, Sampler, restore_training
from clip_retrieval.training.step import Trainer

COMPILED_LENGTHS = 16  # a compiled text tower sees lengths that are multiples of this


@dataclass
class Run:
    """What belongs to a run, so that its chapters can be read one by one."""

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
    metrics: MetricsLog | None
    progress: Progress
    processes: Processes
    collapse: CollapseWatch | None

    @property
    def total_steps(self) -> int:
        return self.options.train.max_steps or self.options.train.epochs * len(self.sampler)

    @property
    def batch_in_words(self) -> str:
        """The global batch as processes x pairs each: `1024 = 8 x 128`."""
        batch_size, processes = self.sampler.batch_size, self.processes.world_size
        return f"{batch_size} = {processes} x {batch_size // processes}"


def prepare(
    options: Options,
    checkpoint: dict[str, Any] | None,
    folder: Path,
    lock: FolderLock | None,
    stop: StopSignal,
    processes: Processes,
) -> Run:
    """Read the data, build the model, and bring both to the state of the checkpoint.

    `lock` is the main process's, on `folder`; None in the others.
    """
    # model and data
    device = choose_device(options.run.device)
    precision = choose_precision(options.train.precision, device)
    if options.train.compile:
        check_compiles(device)
    torch.manual_seed(options.train.seed)
    with processes.main_first():  # it may download
        model, built, tokenizer = load_model(options, checkpoint)
    with processes.main_first() if options.data.image_cache else nullcontext():  # it may have to be built
        train, val, test = load_data(options, tokenizer, built.preprocess, device, processes)
    with processes.main_first():  # an archive may have to be extracted
        zero_shot = load_zero_shot(options, tokenizer, built.preprocess)
    # the trainer, fresh or as the checkpoint has it
    sampler = make_sampler(options, train, processes)
    trainer = make_trainer(options, model.to(device), precision, device, processes)
    progress = Progress(weights=built.weights)
    if checkpoint is not None:
        progress = restore_training(
            checkpoint,
            options.run.resume,
            trainer,
            sampler,
            reset_optimizer=options.run.reset_optimizer,
            reset_data_offset=options.run.reset_data_offset,
        )
        progress.weights = progress.weights or built.weights
    loader = make_loader(options, model, train, sampler, precision, device, processes)

    # the folder: nothing can be refused any more, so only now is a run that was here before replaced
    if options.run.overwrite and processes.is_main:
        clear_run(folder)
    source = Path(options.run.resume or folder).parent
    if progress.best is not None and not has_best(source, (progress.best["step"], progress.step)):
        log.warning("the best checkpoint so far is not beside the one that is resumed: the best is chosen anew")
        progress.best = None
    metrics = None
    if processes.is_main:
        log_to_file(folder)
        if progress.best is not None:
            copy_best(source, folder)
        write_options(folder, without_resume(options, folder), f"{device} ({device_name(device)})")
        metrics = MetricsLog(folder, progress.kept_lines())
    data = (sampler, loader, val, test, zero_shot)
    collapse = CollapseWatch(sampler.batch_size) if options.loss.loss == "infonce" else None
    run = Run(options, folder, lock, stop, built, model, trainer, *data, metrics, progress, processes, collapse)
    if options.train.warmup > run.total_steps:
        log.warning(f"--warmup {options.train.warmup:g} is longer than the run: it becomes {run.total_steps} steps")
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    log.info(
        f"{learning:,.2f} M parameters learn; {run.total_steps:,} steps, {len(sampler):,} an epoch, of "
        f"{run.batch_in_words} pairs, {precision} on {device}"
    )
    return run


def load_data(
    options: Options, tokenizer: Any, preprocess: dict[str, Any], device: torch.device, processes: Processes
) -> tuple[Split | StreamedSplit, Split | None, Split | None]:
    """The train, val and test splits; a data set without splits is all to train on, with nothing held out."""
    if options.data.streamed:
        train = open_stream(options, tokenizer, preprocess, device, processes)
    elif train := load_split(options, "train", tokenizer, preprocess, device, options.data.augment):
        log_samples(train.dataset)
    if train is None:
        place = options.data.place
        raise UserError(f"{options.data.name} in {place} has no train split; give the data to train on")
    val = test = None
    if train.split != UNSPLIT:
        val = load_split(options, "val", tokenizer, preprocess, device)
        test = load_split(options, "test", tokenizer, preprocess, device, answered=False)
    if val is None:
        log.warning("there is no val split: no checkpoint is chosen as the best, the last one is reported")
    if test is None:
        log.warning("there is no test split: the final numbers are those of val, if there is one")
    return train, val, test


def load_zero_shot(options: Options, tokenizer: Any, preprocess: dict[str, Any]) -> ZeroShotTask | None:
    """The labelled images that the model classifies now and then, if there are any."""
    wanted = options.evaluation
    if not wanted.zero_shot_eval:
        return None
    data = ZeroShotData(
        wanted.zero_shot_eval,
        Path(wanted.zero_shot_root or options.data.parts()[0].dataset_root),
        class_names=Path(wanted.zero_shot_class_names) if wanted.zero_shot_class_names else None,
        templates=wanted.zero_shot_templates,
        options=OptionNames("--zero_shot_root", "--zero_shot_class_names", "--zero_shot_templates", download=None),
    )
    return prepare_task(data, tokenizer, preprocess)


def make_sampler(options: Options, train: Split | StreamedSplit, processes: Processes) -> Sampler:
    """The batches of the run; a split smaller than the batch shrinks the batch."""
    batch_size, sampling = options.train.batch_size, options.data.caption_sampling
    streamed = isinstance(train, StreamedSplit)
    samples = train.samples if streamed else number_of_samples(train.dataset, sampling)
    if samples < batch_size:
        shrunk = samples - samples % processes.world_size
        if shrunk < 2:
            raise UserError(f"the train split has {samples} pairs: too few to train on")
        log.warning(f"the train split has {samples} pairs an epoch: --batch_size {batch_size} becomes {shrunk}")
        batch_size = shrunk
    if streamed:
        return make_order(options, train, batch_size)
    weights = options.data.dataset_weights if len(options.data.parts()) > 1 else None
    sampler = BatchSampler(train.dataset, batch_size, sampling, options.train.seed, weights)
    if weights:
        shares = (f"{share:,} of {part.name}" for share, part in zip(sampler.shares, train.dataset.parts))
        log.info(f"an epoch's {samples:,} pairs: {', '.join(shares)}")
    return sampler


def make_loader(
    options: Options,
    model: RetrievalModel,
    train: Split | StreamedSplit,
    sampler: Sampler,
    precision: str,
    device: torch.device,
    processes: Processes,
) -> Loader:
    """This process's part of the batches; what a frozen tower gives for them is computed here, once."""
    bucket = COMPILED_LENGTHS if options.train.compile else 1
    if isinstance(train, StreamedSplit):
        return make_stream_loader(options, model, train, sampler, device, processes, bucket=bucket)
    images, texts = train.pixels, train.tokens
    num_workers = choose_num_workers(options.data.num_workers, train.pixels, device)
    if not options.train.no_feature_cache:
        encoding = {
            "batch_size": options.evaluation.eval_batch_size,
            "precision": precision,
            "device": device,
            "processes": processes,
        }
        if vision_is_frozen(model) and options.data.augment == "none":
            log.info("the image tower is frozen: all images are encoded once, before the first step")
            images = encode_frozen_images(model, train.pixels, num_workers=num_workers, **encoding)
        if text_is_frozen(model):
            log.info("the text tower is frozen: all captions are encoded once, before the first step")
            texts = encode_frozen_texts(model, train.dataset, train.tokens, **encoding)
    return TrainLoader(
        sampler,
        images,
        texts,
        trim=model.trims_text,
        bucket=bucket,
        share=process_slice(sampler.batch_size, processes.rank, processes.world_size),
        num_workers=num_workers,
        device=device,
        processes=processes,
        skip_unreadable=options.data.skips_unreadable,
    )


def make_trainer(
    options: Options, model: RetrievalModel, precision: str, device: torch.device, processes: Processes
) -> Trainer:
    """Choose what learns, and give it a loss and an optimizer."""
    loss = LOSSES[options.loss.loss]
    set_trainable(
        model,
        options.train.trainable,
        freeze_vision=options.train.freeze_vision,
        freeze_text=options.train.freeze_text,
        learn_scale=loss.learns_scale,
        learn_bias=loss.learns_bias,
    )
    if options.train.grad_checkpointing:
        model.clip.set_grad_checkpointing()
    if processes.world_size > 1 and not vision_is_frozen(model):
        model.clip.visual = share_statistics(model.clip.visual, device)
    if device.type == "cuda":
        model.clip.visual.to(memory_format=torch.channels_last)  # the layout that its convolutions are fastest in
    if options.train.compile:
        model.compile_towers()
    return Trainer(
        model,
        options.loss,
        options.train,
        precision=precision,
        device=device,
        processes=processes,
    )
