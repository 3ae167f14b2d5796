"""A finetune before its first step: what belongs to it, made ready or brought to where a checkpoint stood."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clip_retrieval.data.dataset import UNSPLIT
from clip_retrieval.data.loader import TrainLoader, choose_num_workers
from clip_retrieval.data.sampler import BatchSampler, number_of_samples, process_slice
from clip_retrieval.errors import UserError
from clip_retrieval.losses import make_loss
from clip_retrieval.models.build import BuiltModel
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.models.trainable import set_trainable
from clip_retrieval.models.weights import read_checkpoint
from clip_retrieval.options import Options
from clip_retrieval.reporting.log import MetricsLog, log, log_to_file
from clip_retrieval.reporting.results import write_options
from clip_retrieval.signals import StopSignal
from clip_retrieval.start import Split, load_model, load_split, log_samples
from clip_retrieval.training.checkpoint import save_checkpoint
from clip_retrieval.training.precision import choose_device, choose_precision, device_name
from clip_retrieval.training.state import Progress, restore_training
from clip_retrieval.training.step import Trainer


@dataclass
class Run:
    """What belongs to a run, so that its chapters can be read one by one."""

    options: Options
    folder: Path
    stop: StopSignal
    built: BuiltModel
    model: RetrievalModel
    trainer: Trainer
    sampler: BatchSampler
    loader: TrainLoader
    val: Split | None
    test: Split | None
    metrics: MetricsLog
    progress: Progress

    @property
    def total_steps(self) -> int:
        return self.options.train.max_steps or self.options.train.epochs * len(self.sampler)

    @property
    def batch_in_words(self) -> str:
        """The global batch as processes x pairs each: `256 = 1 x 256`."""
        return f"{self.sampler.batch_size} = 1 x {self.sampler.batch_size}"


def refuse_another_run(folder: Path, options: Options, checkpoint: dict[str, Any] | None) -> None:
    """A folder with a run in it needs --resume from there, or --overwrite, which must not take away what is read."""
    if not (folder / "last.pt").exists():
        return
    sources = {"--resume": options.run.resume, "--pretrained": options.model.pretrained}
    for name, source in sources.items():
        if options.run.overwrite and source and Path(source).resolve().parent == folder.resolve():
            raise UserError(f"--overwrite would take away {source} ({name}); drop it, or choose another --experiments")
    goes_on = checkpoint is not None and "optimizer" in checkpoint
    resumes_here = goes_on and Path(options.run.resume).resolve().parent == folder.resolve()
    if not resumes_here and not options.run.overwrite:
        raise UserError(
            f"{folder} already holds a run; go on with it (--resume auto), start afresh there (--overwrite), or choose "
            "another --experiments"
        )


def prepare(
    options: Options, checkpoint: dict[str, Any] | None, folder: Path, stop: StopSignal, *, typed_model: bool
) -> Run:
    """Read the data, build the model, and bring both to where the checkpoint stood."""
    device = choose_device(options.run.device)
    precision = choose_precision(options.train.precision, device)
    torch.manual_seed(options.train.seed)
    model, built, tokenizer = load_model(options, checkpoint, typed_model=typed_model)
    train, val, test = load_data(options, tokenizer)
    sampler = make_sampler(options, train)
    trainer = make_trainer(options, model.to(device), precision, device)
    loader = TrainLoader(
        sampler,
        train.tokens,
        trim=model.trims_text,
        preprocess=built.preprocess,
        augment=options.data.augment,
        share=process_slice(sampler.batch_size, rank=0, world_size=1),
        num_workers=choose_num_workers(options.data.num_workers, train.dataset.images, device),
        pin_memory=device.type == "cuda",
    )
    progress = Progress()
    if checkpoint is not None:
        progress = restore_training(
            checkpoint,
            options.run.resume,
            trainer,
            sampler,
            reset_optimizer=options.run.reset_optimizer,
            reset_data_offset=options.run.reset_data_offset,
        )

    # Nothing can be refused any more: only now is a run that stood here before replaced.
    if options.run.overwrite:
        clear_run(folder)
    log_to_file(folder)
    if progress.best is not None and not bring_best(Path(options.run.resume).parent, folder, progress.best["step"]):
        log.warning("the best checkpoint so far is not beside the one to go on from: the best is chosen anew")
        progress.best = None
    write_options(folder, options, f"{device} ({device_name(device)})")
    metrics = MetricsLog(folder, progress.kept_lines())
    run = Run(options, folder, stop, built, model, trainer, sampler, loader, val, test, metrics, progress)
    if options.train.warmup > run.total_steps:
        log.warning(f"--warmup {options.train.warmup:g} is longer than the run: it becomes {run.total_steps} steps")
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    log.info(
        f"{learning:,.2f} M parameters learn; {run.total_steps:,} steps, {len(sampler):,} an epoch, of "
        f"{run.batch_in_words} pairs, {precision} on {device}"
    )
    return run


def load_data(options: Options, tokenizer: Any) -> tuple[Split, Split | None, Split | None]:
    """The train, val and test splits; a data set without splits is all to train on, with nothing held out."""
    train = load_split(options, "train", tokenizer)
    if train is None:
        place = options.data.annotations or options.data.dataset_root
        raise UserError(f"{options.data.dataset} in {place} has no train split; give the data to train on")
    log_samples(train.dataset)
    val = test = None
    if train.dataset.split != UNSPLIT:
        val, test = load_split(options, "val", tokenizer), load_split(options, "test", tokenizer)
    if val is None:
        log.warning("there is no val split: no checkpoint is chosen as the best, the last one is reported")
    if test is None:
        log.warning("there is no test split: the final numbers are those of val, if there is one")
    return train, val, test


def make_sampler(options: Options, train: Split) -> BatchSampler:
    """The batches of the run; a split smaller than the batch shrinks the batch."""
    batch_size, sampling = options.train.batch_size, options.data.caption_sampling
    samples = number_of_samples(train.dataset, sampling)
    if samples < batch_size:
        shrunk = samples - samples % options.train.accum_freq
        if shrunk < 2:
            raise UserError(f"the train split has {samples} pairs: too few to train on")
        log.warning(f"the train split has {samples} pairs an epoch: --batch_size {batch_size} becomes {shrunk}")
        batch_size = shrunk
    return BatchSampler(train.dataset, batch_size, sampling, options.train.seed)


def make_trainer(options: Options, model: RetrievalModel, precision: str, device: torch.device) -> Trainer:
    """Choose what learns, and give it a loss and an optimizer."""
    set_trainable(
        model,
        options.train.trainable,
        freeze_vision=options.train.freeze_vision,
        freeze_text=options.train.freeze_text,
        learn_scale=options.loss.loss != "margin",
        learn_bias=options.loss.loss == "siglip",
    )
    if options.train.grad_checkpointing:
        model.clip.set_grad_checkpointing()
    return Trainer(
        model,
        make_loss(options.loss),
        options.train,
        clamp_scale=options.loss.loss == "infonce",
        precision=precision,
        device=device,
    )


def clear_run(folder: Path) -> None:
    """Take away the files of a run, and nothing else."""
    files = ["last.pt", "best.pt", "metrics.jsonl", "results.json", "log.txt"]
    for path in [*(folder / name for name in files), *folder.glob("epoch_*.pt")]:
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


def bring_best(source: Path, folder: Path, step: int) -> bool:
    """See that the best.pt of step `step` is in `folder`, from `source` if need be; False where there is none."""
    best = source / "best.pt"
    if not best.is_file():
        return False
    content = read_checkpoint(best)
    if content is None or content["step"] != step:
        return False
    if source.resolve() != folder.resolve():
        save_checkpoint(folder / "best.pt", content)
    return True
