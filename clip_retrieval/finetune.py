"""The finetuning run.

python main.py --vision_model ViT-B/32 --dataset_root DATA
python main.py --vision_model ViT-B/32 --dataset_root DATA --resume auto    # go on where it stood
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from clip_retrieval.data.loader import TrainBatch, TrainLoader, choose_num_workers
from clip_retrieval.data.sampler import BatchSampler, number_of_samples, process_slice
from clip_retrieval.errors import Interrupted, UserError
from clip_retrieval.evaluation.protocols import score
from clip_retrieval.losses import make_loss
from clip_retrieval.models.build import BuiltModel
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.models.trainable import set_trainable
from clip_retrieval.models.weights import read_checkpoint
from clip_retrieval.options import Options
from clip_retrieval.reporting.log import MetricsLog, log, start_log
from clip_retrieval.reporting.results import write_json, write_options
from clip_retrieval.reporting.table import results_table
from clip_retrieval.signals import StopSignal
from clip_retrieval.start import (
    Split,
    load_model,
    load_split,
    log_samples,
    make_folder,
    run_folder,
    settle_options,
    with_absolute_paths,
)
from clip_retrieval.training.checkpoint import random_state, restore_random_state, save_checkpoint
from clip_retrieval.training.precision import choose_device, choose_precision
from clip_retrieval.training.schedule import learning_rate, warmup_steps
from clip_retrieval.training.step import StepResult, Trainer


@dataclass
class Progress:
    """How far a run is. `step` counts the steps done; the rest is what has been found on the way."""

    step: int = 0
    evaluated_step: int = -1
    best: dict[str, Any] | None = None
    before: dict[str, Any] | None = None
    seconds: float = 0.0


@dataclass
class Run:
    """What belongs to a run, so that its chapters can be read one by one."""

    options: Options
    folder: Path
    device: torch.device
    built: BuiltModel
    model: RetrievalModel
    trainer: Trainer
    sampler: BatchSampler
    loader: TrainLoader
    val: Split | None
    test: Split | None
    metrics: MetricsLog
    progress: Progress = field(default_factory=Progress)

    @property
    def total_steps(self) -> int:
        return self.options.train.max_steps or self.options.train.epochs * len(self.sampler)

    @property
    def batch_in_words(self) -> str:
        """The global batch as processes x pairs each: `256 = 1 x 256`."""
        return f"{self.sampler.batch_size} = 1 x {self.sampler.batch_size}"


def finetune(typed: dict[str, Any]) -> None:
    """Finetune a model, keep the best on the val split, and report it."""
    start_log()
    options, checkpoint = settle_options(typed)
    folder = run_folder(options)
    claim_folder(folder, options)
    with StopSignal().listening() as stop:
        run = prepare(options, checkpoint, folder, typed_model="vision_model" in typed)
        try:
            if run.progress.step < run.total_steps:
                evaluate_first(run)
                train(run, stop)
            finish(run)
        except KeyboardInterrupt:
            save_last(run)
            raise Interrupted(
                f"interrupted at step {run.progress.step} of {run.total_steps}, saved; "
                f"the same command with --resume {folder / 'last.pt'} goes on"
            ) from None
        finally:
            run.metrics.close()


def claim_folder(folder: Path, options: Options) -> None:
    """See that the run may write into `folder`. A folder with a run in it needs --resume from there or --overwrite."""
    last = folder / "last.pt"
    resumes_here = options.run.resume is not None and Path(options.run.resume).resolve().parent == folder.resolve()
    if last.exists() and not resumes_here:
        if not options.run.overwrite:
            raise UserError(
                f"{folder} already holds a run; go on with it (--resume auto), start afresh there (--overwrite), "
                "or choose another --experiments"
            )
        for name in ("last.pt", "best.pt", "metrics.jsonl", "results.json", "log.txt"):
            (folder / name).unlink(missing_ok=True)
        for numbered in folder.glob("epoch_*.pt"):
            numbered.unlink()
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    make_folder(folder)


def prepare(options: Options, checkpoint: dict[str, Any] | None, folder: Path, *, typed_model: bool) -> Run:
    """Read the data, build the model, and bring both to where the checkpoint stood."""
    start_log(folder)
    device = choose_device(options.run.device)
    precision = choose_precision(options.train.precision, device)
    write_options(folder, options, device)
    torch.manual_seed(options.train.seed)

    model, built, tokenizer = load_model(options, checkpoint, typed_model=typed_model)
    train, val, test = (load_split(options, split, tokenizer) for split in ("train", "val", "test"))
    if train is None:
        raise UserError(f"--dataset {options.data.dataset}: there is no train split in {options.data.dataset_root}")
    log_samples(train.dataset)
    if val is None:
        log.warning("there is no val split: no checkpoint is chosen as the best, the last one is reported")

    model.to(device)
    set_trainable(
        model,
        options.train.trainable,
        freeze_vision=options.train.freeze_vision,
        freeze_text=options.train.freeze_text,
        learn_scale=options.loss.loss != "margin",
    )
    if options.train.grad_checkpointing:
        model.clip.set_grad_checkpointing()
    sampler = make_sampler(options, train)
    trainer = Trainer(
        model,
        make_loss(options.loss),
        options.train,
        clamp_scale=options.loss.loss == "infonce",
        precision=precision,
        device=device,
    )
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
    progress = restore(checkpoint, trainer, sampler, options, device)
    metrics = MetricsLog(folder, progress.step)
    run = Run(options, folder, device, built, model, trainer, sampler, loader, val, test, metrics, progress)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    log.info(
        f"{learning:,.2f} M parameters learn; {run.total_steps:,} steps, {len(sampler):,} an epoch, of "
        f"{run.batch_in_words} pairs, {precision} on {device}"
    )
    return run


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


def restore(
    checkpoint: dict[str, Any] | None,
    trainer: Trainer,
    sampler: BatchSampler,
    options: Options,
    device: torch.device,
) -> Progress:
    """Bring optimizer, scaler and random state to where the checkpoint stood, and say how far that was."""
    if checkpoint is None:
        return Progress()
    if "optimizer" not in checkpoint:
        log.info(f"{options.run.resume} holds a model without its optimizer: its weights start a new run")
        return Progress()
    stored = checkpoint["sampler"]
    if (stored["batch_size"], stored["sampling"], stored["seed"]) != (
        sampler.batch_size,
        sampler.sampling,
        sampler.seed,
    ) and not options.run.reset_data_offset:
        raise UserError(
            f"{options.run.resume} was trained with --batch_size {stored['batch_size']} --caption_sampling "
            f"{stored['sampling']} --seed {stored['seed']} and goes on only with them; to change them start a new run "
            "from its weights (--pretrained), or add --reset_data_offset"
        )
    if not options.run.reset_optimizer:
        try:
            trainer.optimizer.load_state_dict(checkpoint["optimizer"])
        except (ValueError, KeyError):
            raise UserError(
                f"{options.run.resume}: other parameters learned there; keep --trainable, --freeze_* and --loss as "
                "they were, or add --reset_optimizer"
            ) from None
        trainer.scaler.load_state_dict(checkpoint["scaler"])
    restore_random_state(checkpoint["random"], device)
    if options.run.reset_data_offset:
        return Progress()
    log.info(f"going on from {options.run.resume}, step {checkpoint['step']}")
    return Progress(**checkpoint["progress"])


def evaluate_first(run: Run) -> None:
    """Score the model that the run starts from, on the split that is reported at the end."""
    split = run.test or run.val
    if run.progress.step or run.progress.before or split is None or run.options.evaluation.no_eval_first:
        return
    run.progress.before = score_split(run, split)
    log.info("before training:\n" + results_table({split.dataset.split: run.progress.before}))


def train(run: Run, stop: StopSignal) -> None:
    """Go through the steps that are left; save and evaluate at the end of each epoch."""
    progress, per_epoch = run.progress, len(run.sampler)
    if progress.step and progress.step % per_epoch == 0 and progress.evaluated_step < progress.step:
        end_of_epoch(run)
    while progress.step < run.total_steps:
        with stop.deferred():
            train_epoch(run, stop)
        end_of_epoch(run)


def train_epoch(run: Run, stop: StopSignal) -> None:
    """The steps that are left of an epoch, or fewer if an end is asked for."""
    progress, options, per_epoch = run.progress, run.options, len(run.sampler)
    epoch, first_batch = divmod(progress.step, per_epoch)
    last_step = min((epoch + 1) * per_epoch, run.total_steps)
    warmup = warmup_steps(options.train.warmup, run.total_steps)
    run.model.train()
    watch = Stopwatch()
    bar = tqdm(total=last_step - epoch * per_epoch, initial=first_batch, desc=f"epoch {epoch + 1}", disable=None)
    batches = run.loader.epoch(epoch, first_batch)
    while progress.step < last_step and not stop.requested:
        with watch.waiting():
            batch = next_batch(batches, stop)
        if batch is None:
            break
        rate = learning_rate(progress.step, peak=options.train.lr, warmup_steps=warmup, total_steps=run.total_steps)
        result = run.trainer.step(batch, progress.step + 1, rate)
        progress.step += 1
        watch.pairs += len(batch.images)
        bar.update()
        if progress.step % options.run.display == 0 or progress.step == run.total_steps:
            log_step(run, result, rate, epoch, watch)
        if options.run.save_every and progress.step % options.run.save_every == 0:
            save_last(run)
    bar.close()


def next_batch(batches: Iterator[TrainBatch], stop: StopSignal) -> TrainBatch | None:
    """The next batch; None where a signal to the whole process group has ended the loader's workers too."""
    try:
        return next(batches)
    except RuntimeError:
        if stop.requested:
            return None
        raise


def end_of_epoch(run: Run) -> None:
    """Save, so that an interrupted evaluation costs nothing; evaluate; keep what is the best; save again."""
    progress, options = run.progress, run.options
    epoch = -(-progress.step // len(run.sampler))
    save_last(run)
    due = options.evaluation.eval_every and epoch % options.evaluation.eval_every == 0
    if run.val is not None and (due or progress.step == run.total_steps):
        block = score_split(run, run.val)
        run.metrics.write("val", progress.step, {name: block[name] for name in ("i2t", "t2i", "mean_recall", "rsum")})
        better = progress.best is None or block["rsum"] > progress.best["block"]["rsum"]
        log.info(
            f"epoch {epoch}  val rsum {block['rsum']:.2f}  i2t R@1 {block['i2t']['R@1']:.2f}  "
            f"t2i R@1 {block['t2i']['R@1']:.2f}" + ("  best so far" if better else "")
        )
        if better:
            progress.best = {"step": progress.step, "epoch": epoch, "block": block}
            save_checkpoint(run.folder / "best.pt", model_content(run) | {"val": block})
    progress.evaluated_step = progress.step
    save_last(run)
    if options.run.keep_every and epoch % options.run.keep_every == 0:
        save_checkpoint(run.folder / f"epoch_{epoch}.pt", model_content(run) | training_content(run))


def finish(run: Run) -> None:
    """Load the best model, report it on the val and test splits, and write results.json."""
    progress = run.progress
    best = run.folder / "best.pt"
    if progress.best is not None and best.is_file():
        run.model.load_weights(read_checkpoint(best)["model"])
        log.info(f"the best on val is epoch {progress.best['epoch']}, step {progress.best['step']}")
    val = progress.best["block"] if progress.best else None
    if val is None and run.val is not None:
        val = score_split(run, run.val)
    test = score_split(run, run.test) if run.test is not None else None

    results = dict(test or val or {"dataset": run.options.data.dataset})
    results |= {
        "model": run.built.name,
        "weights": run.built.weights,
        "training_precision": run.trainer.precision,
        "step": progress.best["step"] if progress.best else progress.step,
        "steps": progress.step,
    }
    results["seconds"] = results.get("seconds", {}) | {"training": progress.seconds}
    if val is not None:
        results["val"] = val
    if progress.before is not None:
        results["before"] = progress.before
    write_json(run.folder / "results.json", results)

    final = {"before": progress.before, "val": val, "test": test}
    lines = {f"{name}, {b['split']}" if name == "before" else name: b for name, b in final.items() if b is not None}
    if lines:
        log.info(results_table(lines))
    written = ", ".join(str(run.folder / name) for name in ("results.json", "best.pt", "last.pt"))
    log.info(f"wrote {written if best.is_file() else written.replace(f'{best}, ', '')}")


def score_split(run: Run, split: Split) -> dict[str, Any]:
    """The results block of a split."""
    options = run.options
    return score(
        run.model,
        split.dataset,
        split.tokens,
        options.evaluation,
        num_workers=options.data.num_workers,
        device=run.device,
    )


def log_step(run: Run, result: StepResult, rate: float, epoch: int, watch: Stopwatch) -> None:
    """One log line. Asks the device for the numbers, and so waits for it."""
    run.trainer.check_finite()
    i2t, t2i = result.accuracy()
    speed, waited = watch.lap()
    run.progress.seconds += watch.seconds
    values = {
        "epoch": epoch + 1,
        "loss": result.loss.item(),
        "lr": rate,
        "logit_scale": run.model.clip.logit_scale.exp().item(),
        "i2t_accuracy": i2t,
        "t2i_accuracy": t2i,
        "pairs_per_second": speed,
        "data_percent": waited,
    }
    run.metrics.write("train", run.progress.step, values)
    log.info(
        f"epoch {epoch + 1}  step {run.progress.step}/{run.total_steps}  loss {values['loss']:.4f}  lr {rate:.2e}  "
        f"scale {values['logit_scale']:.2f}  accuracy i2t {i2t:.1f} t2i {t2i:.1f}  {speed:.1f} pairs/s  "
        f"data {waited:.0f}%  {run.batch_in_words}"
    )


def save_last(run: Run) -> None:
    """Write last.pt, unless a loss was not finite: then the one from before stays."""
    run.trainer.check_finite()
    save_checkpoint(run.folder / "last.pt", model_content(run) | training_content(run))


def model_content(run: Run) -> dict[str, Any]:
    """What a checkpoint needs to be evaluated."""
    return {
        "model": run.model.weights(),
        "model_config": run.built.config,
        "preprocess": run.built.preprocess,
        "options": with_absolute_paths(run.options.flat()),
        "epoch": run.progress.step // len(run.sampler),
        "step": run.progress.step,
    }


def training_content(run: Run) -> dict[str, Any]:
    """What a checkpoint needs, besides, to go on exactly."""
    sampler = run.sampler
    epoch, batch = divmod(run.progress.step, len(sampler))
    return {
        "optimizer": run.trainer.optimizer.state_dict(),
        "scaler": run.trainer.scaler.state_dict(),
        "random": random_state(run.device),
        "sampler": {
            "epoch": epoch,
            "batch": batch,
            "batch_size": sampler.batch_size,
            "sampling": sampler.sampling,
            "seed": sampler.seed,
        },
        "progress": asdict(run.progress),
    }


class Stopwatch:
    """Speed, and the share of time spent waiting for data, between two log lines."""

    def __init__(self) -> None:
        self.pairs = 0
        self.seconds = 0.0
        self._waited = 0.0
        self._started = time.perf_counter()

    def waiting(self) -> Stopwatch:
        return self

    def __enter__(self) -> None:
        self._wait_started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._waited += time.perf_counter() - self._wait_started

    def lap(self) -> tuple[float, float]:
        """Pairs per second and percent of time waited since the last lap; starts the next."""
        now = time.perf_counter()
        self.seconds = now - self._started
        speed, waited = self.pairs / self.seconds, 100 * self._waited / self.seconds
        self.pairs, self._waited, self._started = 0, 0.0, now
        return speed, waited
