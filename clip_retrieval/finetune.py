"""The finetuning run.

python main.py --vision_model ViT-B/32 --dataset_root DATA
python main.py --vision_model ViT-B/32 --dataset_root DATA --resume auto    # go on where it stood
"""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from clip_retrieval.data.dataset import UNSPLIT
from clip_retrieval.data.loader import TrainLoader, choose_num_workers
from clip_retrieval.data.sampler import BatchSampler, number_of_samples, process_slice
from clip_retrieval.errors import Interrupted, NotFiniteError, RunError, UserError
from clip_retrieval.evaluation.protocols import score
from clip_retrieval.losses import make_loss
from clip_retrieval.models.build import BuiltModel
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.models.trainable import set_trainable
from clip_retrieval.models.weights import read_checkpoint
from clip_retrieval.options import Options
from clip_retrieval.reporting.log import MetricsLog, log, log_to_file, start_log
from clip_retrieval.reporting.results import write_json, write_options
from clip_retrieval.reporting.stopwatch import Stopwatch
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
from clip_retrieval.training.checkpoint import save_checkpoint
from clip_retrieval.training.precision import choose_device, choose_precision, device_name
from clip_retrieval.training.schedule import learning_rate, warmup_steps
from clip_retrieval.training.state import Progress, restore_training, training_state
from clip_retrieval.training.step import StepResult, Trainer


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


def finetune(typed: dict[str, Any]) -> None:
    """Finetune a model, keep the best on the val split, and report it."""
    start_log()
    options, checkpoint = settle_options(typed)
    folder = run_folder(options)
    refuse_another_run(folder, options, checkpoint)
    make_folder(folder)
    with StopSignal().listening() as stop:
        with stop.interruptible():
            run = prepare(options, checkpoint, folder, stop, typed_model="vision_model" in typed)
        with closing(run.metrics):
            try:
                evaluate_first(run)
                train(run)
            except KeyboardInterrupt:
                save_last(run)
                raise interrupted(run) from None
            try:
                finish(run)
            except KeyboardInterrupt:
                raise interrupted(run) from None


def interrupted(run: Run) -> Interrupted:
    """What is said when a run was stopped and saved."""
    without = ", without --overwrite," if run.options.run.overwrite else ""
    return Interrupted(
        f"interrupted at step {run.progress.step} of {run.total_steps}, saved; the same command{without} with --resume "
        f"{run.folder / 'last.pt'} goes on"
    )


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


def evaluate_first(run: Run) -> None:
    """Score the model that the run starts from, on the split that is reported at the end."""
    split = run.test or run.val
    done = run.progress.step or run.progress.before
    if done or split is None or run.options.evaluation.no_eval_first:
        return
    run.progress.before = score_split(run, split)
    write_scores(run, "before", run.progress.before)
    log.info("before training:\n" + results_table({split.dataset.split: run.progress.before}))


def train(run: Run) -> None:
    """Go through the steps that are left; save and evaluate at the end of each epoch."""
    progress = run.progress
    at_an_end = progress.step and (progress.step % len(run.sampler) == 0 or progress.step >= run.total_steps)
    if at_an_end and progress.evaluated_step < progress.step:
        end_of_epoch(run)
    elif progress.step and not (run.folder / "last.pt").exists():  # resumed from another folder
        save_last(run)
    while progress.step < run.total_steps:
        train_epoch(run)
        end_of_epoch(run)


def train_epoch(run: Run) -> None:
    """The steps that are left of an epoch. Between two of them the run can be interrupted."""
    progress, options, per_epoch = run.progress, run.options, len(run.sampler)
    epoch, first_batch = divmod(progress.step, per_epoch)
    last_step = min((epoch + 1) * per_epoch, run.total_steps)
    warmup = warmup_steps(options.train.warmup, run.total_steps)
    batches = run.loader.epoch(epoch, first_batch)
    bar = tqdm(total=last_step - epoch * per_epoch, initial=first_batch, desc=f"epoch {epoch + 1}", disable=None)
    watch = Stopwatch()
    run.model.train()
    started = time.perf_counter() - progress.seconds
    with bar:
        while progress.step < last_step:
            run.stop.check()
            with run.stop.interruptible(), watch.waiting():
                batch = next(batches)
            rate = learning_rate(progress.step, peak=options.train.lr, warmup_steps=warmup, total_steps=run.total_steps)
            result = run.trainer.step(batch, progress.step + 1, rate)
            progress.step += 1
            progress.seconds = time.perf_counter() - started
            watch.count(len(batch.images))
            bar.update()
            if progress.step % options.run.display == 0 or progress.step == run.total_steps:
                log_step(run, result, rate, epoch, watch)
            if options.run.save_every and progress.step % options.run.save_every == 0:
                save_last(run)


def end_of_epoch(run: Run) -> None:
    """Save, so that an interrupted evaluation costs nothing; evaluate; keep what is the best; save again."""
    progress, options = run.progress, run.options
    epoch = -(-progress.step // len(run.sampler))
    save_last(run)
    due = options.evaluation.eval_every and epoch % options.evaluation.eval_every == 0
    if run.val is not None and (due or progress.step == run.total_steps):
        evaluate_epoch(run, run.val, epoch)
    progress.evaluated_step = progress.step
    save_last(run)
    if options.run.keep_every and epoch % options.run.keep_every == 0:
        save_checkpoint(run.folder / f"epoch_{epoch}.pt", whole_content(run))


def evaluate_epoch(run: Run, val: Split, epoch: int) -> None:
    """Score the model on the val split, and keep it as best.pt if it is the best so far."""
    progress, block = run.progress, score_split(run, val)
    write_scores(run, "val", block)
    better = progress.best is None or block["rsum"] > progress.best["block"]["rsum"]
    log.info(
        f"epoch {epoch}  val rsum {block['rsum']:.2f}  i2t R@1 {block['i2t']['R@1']:.2f}  "
        f"t2i R@1 {block['t2i']['R@1']:.2f}" + ("  best so far" if better else "")
    )
    if better:
        progress.best = {"step": progress.step, "epoch": epoch, "block": block}
        save_checkpoint(run.folder / "best.pt", model_content(run) | {"val": block})


def finish(run: Run) -> None:
    """Load the best model, report it on the val and test splits, and write results.json."""
    progress, best = run.progress, run.folder / "best.pt"
    if progress.best is not None:
        run.model.load_weights(read_checkpoint(best)["model"])
        log.info(f"the best on val is epoch {progress.best['epoch']}, step {progress.best['step']}")
    val = progress.best["block"] if progress.best else None
    test = score_split(run, run.test) if run.test is not None else None
    if test:
        write_scores(run, "test", test)

    results = dict(test or val or {"model": run.built.name, "dataset": run.options.data.dataset})
    results |= {
        "weights": run.built.weights,
        "training_precision": run.trainer.precision,
        "step": progress.best["step"] if progress.best else progress.step,
        "steps": progress.step,
        "seconds": results.get("seconds", {}) | {"training": progress.seconds},
    }
    found = {"before": progress.before, "val": val}
    write_json(run.folder / "results.json", results | {name: block for name, block in found.items() if block})

    lines = {f"before, {progress.before['split']}": progress.before} if progress.before else {}
    lines |= {name: block for name, block in (("val", val), ("test", test)) if block}
    if lines:
        log.info(results_table(lines))
    files = [run.folder / name for name in ("results.json", "best.pt", "last.pt")]
    log.info(f"wrote {', '.join(str(path) for path in files if path.exists())}")


def score_split(run: Run, split: Split) -> dict[str, Any]:
    """The results block of a split."""
    options, device = run.options, run.trainer.device
    try:
        with run.stop.interruptible():
            block = score(
                run.model,
                split.dataset,
                split.tokens,
                options.evaluation,
                num_workers=options.data.num_workers,
                device=device,
            )
    except NotFiniteError as error:
        raise RunError(f"the model has diverged: {error}; start again with a lower --lr or --grad_clip 1") from None
    return {"model": run.built.name, **block}


def write_scores(run: Run, kind: str, block: dict[str, Any]) -> None:
    """One line of metrics.jsonl for an evaluation."""
    scores = {name: block[name] for name in ("i2t", "t2i", "mean_recall", "rsum")}
    run.metrics.write(kind, run.progress.step, scores)


def log_step(run: Run, result: StepResult, rate: float, epoch: int, watch: Stopwatch) -> None:
    """One log line. Asks the device for the numbers, and so waits for it."""
    run.trainer.check_finite()
    i2t, t2i = result.accuracy()
    loss, scale = result.loss.item(), run.model.clip.logit_scale.exp().item()
    speed, waited = watch.lap()
    values = {
        "epoch": epoch + 1,
        "loss": loss,
        "lr": rate,
        "logit_scale": scale,
        "i2t_accuracy": i2t,
        "t2i_accuracy": t2i,
        "pairs_per_second": speed,
        "data_percent": waited,
    }
    run.metrics.write("train", run.progress.step, values)
    log.info(
        f"epoch {epoch + 1}  step {run.progress.step}/{run.total_steps}  loss {loss:.4f}  lr {rate:.2e}  "
        f"scale {scale:.2f}  accuracy i2t {i2t:.1f} t2i {t2i:.1f}  {speed:.1f} pairs/s  data {waited:.0f}%  "
        f"{run.batch_in_words}"
    )


def save_last(run: Run) -> None:
    """Write last.pt, unless the loss or a weight is not finite: then the one from before stays."""
    run.trainer.check_finite()
    run.trainer.check_weights_finite()
    save_checkpoint(run.folder / "last.pt", whole_content(run))


def whole_content(run: Run) -> dict[str, Any]:
    """A checkpoint that a run goes on from."""
    return model_content(run) | training_state(run.trainer, run.sampler, run.progress)


def model_content(run: Run) -> dict[str, Any]:
    """The part of a checkpoint that an evaluation needs."""
    return {
        "model": run.model.weights(),
        "model_config": run.built.config,
        "preprocess": run.built.preprocess,
        "options": with_absolute_paths(run.options.flat()),
        "epoch": run.progress.step // len(run.sampler),
        "step": run.progress.step,
    }
