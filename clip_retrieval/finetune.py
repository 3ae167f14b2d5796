"""The finetuning run.

python main.py --vision_model ViT-B/32 --dataset_root DATA
python main.py --vision_model ViT-B/32 --dataset_root DATA --resume auto    # go on where it stood
torchrun --nproc_per_node 8 main.py --vision_model ViT-B/32 --dataset_root DATA
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any

from clip_retrieval.classification.report import summary
from clip_retrieval.classification.task import ZeroShotTask, score_task
from clip_retrieval.device import choose_device, deterministic_algorithms
from clip_retrieval.distributed import process_group
from clip_retrieval.errors import Interrupted, NotFiniteError, RunError, UserError
from clip_retrieval.evaluation.evaluator import SplitFeatures, encode_split, score
from clip_retrieval.files import write_json
from clip_retrieval.log import log, progress_bar, start_log
from clip_retrieval.models.weights import read_checkpoint
from clip_retrieval.reporting.stopwatch import Stopwatch
from clip_retrieval.reporting.table import results_table
from clip_retrieval.run.folder import lock_folder, refuse_another_run, resumes_in, run_folder, without_resume
from clip_retrieval.run.prepare import Run, prepare
from clip_retrieval.run.settings import settle_options, with_absolute_paths
from clip_retrieval.run.splits import Split
from clip_retrieval.signals import StopSignal
from clip_retrieval.training.checkpoint import save_checkpoint
from clip_retrieval.training.schedule import learning_rate, warmup_steps
from clip_retrieval.training.state import training_state
from clip_retrieval.training.step import StepResult


def finetune(typed: dict[str, Any]) -> None:
    """Finetune a model, keep the best on the val split, and report it."""
    start_log()
    options, checkpoint = settle_options(typed)
    folder = run_folder(options)
    with (
        StopSignal().listening() as stop,
        process_group(options.run.device) as processes,
        deterministic_algorithms(choose_device(options.run.device), options.train.deterministic),
        lock_folder(folder) if processes.is_main else nullcontext() as lock,
    ):
        processes.barrier()  # for the lock
        if checkpoint is not None and resumes_in(folder, options):
            checkpoint = read_checkpoint(options.run.resume)  # until the lock was held, another run may have written it
        refuse_another_run(folder, options, checkpoint)
        processes.barrier()  # none looks at the folder after another has begun to write there
        with stop.interruptible():
            run = prepare(options, checkpoint, folder, lock, stop, processes)
        if processes.world_size > 1:
            stop.agree = processes.any
        with closing(run.metrics) if run.metrics else nullcontext():
            try:
                evaluate_first(run)
                train(run)
            except KeyboardInterrupt:
                save_last(run)
                raise make_interrupted(run) from None
            except UserError as error:  # of broken data; of several processes, the others do not know of it
                if processes.world_size > 1 or not run.progress.step:
                    raise
                save_last(run)
                saved = f"saved at step {run.progress.step}; once that is mended, --resume auto goes on"
                raise UserError(f"{error} ({saved})") from None
            try:
                finish(run)
            except KeyboardInterrupt:
                raise make_interrupted(run) from None


def make_interrupted(run: Run) -> Interrupted:
    """What is said when a run was stopped and saved."""
    without = ", without --overwrite," if run.options.run.overwrite else ""
    return Interrupted(
        f"interrupted at step {run.progress.step} of {run.total_steps}, saved; the same command{without} with --resume "
        f"{run.folder / 'last.pt'} goes on"
    )


def evaluate_first(run: Run) -> None:
    """Score the model that the run starts from, on what is reported at the end."""
    progress, split = run.progress, run.test or run.val
    if progress.step or run.options.evaluation.no_eval_first:
        return
    if split is not None and not progress.before:
        _, progress.before = score_split(run, split)
        write_scores(run, "before", progress.before)
        log.info("before training:\n" + results_table({split.dataset.split: progress.before}))
    if run.zero_shot is not None and not progress.zero_shot_before:
        progress.zero_shot_before = score_zero_shot(run, run.zero_shot)


def train(run: Run) -> None:
    """Go through the steps that are left, from one milestone to the next."""
    progress = run.progress
    if progress.step and progress.evaluated_step < progress.step and is_milestone(run):
        milestone(run)
    elif progress.step and run.processes.any(not (run.folder / "last.pt").exists()):  # resumed from another folder
        save_last(run)
    while progress.step < run.total_steps:
        train_on(run)
        milestone(run)


def train_on(run: Run) -> None:
    """The steps up to the next milestone. Between two of them the run can be interrupted."""
    progress, options, per_epoch = run.progress, run.options, len(run.sampler)
    epoch, first_batch = divmod(progress.step, per_epoch)
    warmup = warmup_steps(options.train.warmup, run.total_steps)
    batches = run.loader.epoch(epoch, first_batch)
    left = min(per_epoch, run.total_steps - epoch * per_epoch)
    bar = progress_bar(total=left, initial=first_batch, desc=f"epoch {epoch + 1}")
    watch = Stopwatch()
    run.model.train()
    started = time.perf_counter() - progress.seconds
    with bar:
        while progress.step == epoch * per_epoch + first_batch or not is_milestone(run):
            run.stop.check()
            with run.stop.interruptible(), watch.waiting():
                batch = next(batches)
            rate = learning_rate(progress.step, peak=options.train.lr, warmup_steps=warmup, total_steps=run.total_steps)
            result = run.trainer.step(batch, progress.step + 1, rate)
            progress.step += 1
            progress.seconds = time.perf_counter() - started
            watch.count(run.sampler.batch_size)
            bar.update()
            if progress.step % options.run.display == 0 or progress.step == run.total_steps:
                log_step(run, result, rate, epoch, watch)
            if options.run.save_every and progress.step % options.run.save_every == 0:
                save_last(run)


def is_milestone(run: Run) -> bool:
    """Whether something is to be done after this step: an epoch or the run ends, or an interval of steps does."""
    step, options = run.progress.step, run.options
    intervals = (
        len(run.sampler),
        options.evaluation.eval_steps,
        options.evaluation.zero_shot_steps,
        options.run.keep_steps,
    )
    return step == run.total_steps or any(interval and step % interval == 0 for interval in intervals)


def milestone(run: Run) -> None:
    """Save, so that an interrupted evaluation costs nothing; evaluate; keep what is the best; save again."""
    progress, options = run.progress, run.options
    step, (epoch, rest) = progress.step, divmod(progress.step, len(run.sampler))
    save_last(run)
    after_epochs, after_steps = options.evaluation.eval_every, options.evaluation.eval_steps
    due = (after_epochs and not rest and epoch % after_epochs == 0) or (after_steps and step % after_steps == 0)
    due = due or step == run.total_steps
    if run.val is not None and due:
        evaluate_val(run, run.val)
    zero_shot_steps = options.evaluation.zero_shot_steps
    if run.zero_shot is not None and (step % zero_shot_steps == 0 if zero_shot_steps else due):
        score_zero_shot(run, run.zero_shot)
    progress.evaluated_step = step
    # The numbered ones first: once last.pt says that this milestone is done, a resumed run does not come here again.
    if options.run.keep_every and not rest and epoch % options.run.keep_every == 0:
        save(run, f"epoch_{epoch}.pt", make_checkpoint)
    if options.run.keep_steps and step % options.run.keep_steps == 0:
        save(run, f"step_{step}.pt", make_checkpoint)
    save_last(run)


def evaluate_val(run: Run, val: Split) -> None:
    """Score the model on the val split, and keep it as best.pt if it is the best so far."""
    progress, epoch = run.progress, -(-run.progress.step // len(run.sampler))
    encoded, block = score_split(run, val)
    batches = run.trainer.validate(encoded.images, encoded.captions, val.dataset, run.sampler.batch_size)
    write_scores(run, "val", block | batches)
    better = progress.best is None or block["rsum"] > progress.best["block"]["rsum"]
    log.info(
        f"epoch {epoch}  step {progress.step}  val rsum {block['rsum']:.2f}  i2t R@1 {block['i2t']['R@1']:.2f}  "
        f"t2i R@1 {block['t2i']['R@1']:.2f}  loss {batches['loss']:.4f}  accuracy i2t {batches['i2t_accuracy']:.1f} "
        f"t2i {batches['t2i_accuracy']:.1f}, in batches of {batches['batch_size']}" + ("  best so far" * better)
    )
    if better:
        progress.best = {"step": progress.step, "epoch": epoch, "block": block}
        save(run, "best.pt", lambda run: make_model_checkpoint(run) | {"val": block})


def finish(run: Run) -> None:
    """Load the best model, report it on the val and test splits, and write results.json."""
    progress, best = run.progress, run.folder / "best.pt"
    if progress.best is not None:
        if run.processes.is_main:
            run.model.load_weights(read_checkpoint(best)["model"])
        run.processes.broadcast(run.model.weights())
        log.info(f"the best on val is epoch {progress.best['epoch']}, step {progress.best['step']}")
    val = progress.best["block"] if progress.best else None
    test = None
    if run.test is not None:
        _, test = score_split(run, run.test)
        write_scores(run, "test", test)

    results = dict(test or val or {"model": run.built.name, "dataset": run.options.data.name})
    results |= {
        "weights": progress.weights,
        "training_precision": run.trainer.precision,
        "step": progress.best["step"] if progress.best else progress.step,
        "steps": progress.step,
        "seconds": results.get("seconds", {}) | {"training": progress.seconds},
    }
    found = {"before": progress.before, "val": val}
    if run.zero_shot is not None:
        found["zero_shot"] = score_zero_shot(run, run.zero_shot, "zero_shot_end")
        found["zero_shot_before"] = progress.zero_shot_before
    if run.lock is not None:
        run.lock.check()
        write_json(run.folder / "results.json", results | {name: block for name, block in found.items() if block})

    lines = {f"before, {progress.before['split']}": progress.before} if progress.before else {}
    lines |= {name: block for name, block in (("val", val), ("test", test)) if block}
    if lines:
        log.info(results_table(lines))
    files = [run.folder / name for name in ("results.json", "best.pt", "last.pt")]
    log.info(f"wrote {', '.join(str(path) for path in files if path.exists())}")


@contextmanager
def convert_divergence(run: Run) -> Iterator[None]:
    """A block that can be interrupted, in which features that are not finite are the run's fault."""
    try:
        with run.stop.interruptible():
            yield
    except NotFiniteError as error:
        raise RunError(f"the model has diverged: {error}; start again with a lower --lr or --grad_clip 1") from None


def score_split(run: Run, split: Split) -> tuple[SplitFeatures, dict[str, Any]]:
    """The features and the results block of a split."""
    options, device = run.options, run.trainer.device
    with convert_divergence(run):
        encoded = encode_split(
            run.model,
            split.dataset,
            split.tokens,
            split.pixels,
            options.evaluation,
            num_workers=options.data.num_workers,
            device=device,
            processes=run.processes,
        )
        block = score(encoded, split.dataset, options.evaluation, run.processes)
    return encoded, {"model": run.built.name, "decoder": options.data.decoder, **block}


def score_zero_shot(run: Run, task: ZeroShotTask, kind: str = "zero_shot") -> dict[str, Any]:
    """The results block of the zero-shot classification, without what belongs to single classes."""
    options = run.options
    with convert_divergence(run):
        block = score_task(
            run.model,
            task,
            device=run.trainer.device,
            eval_batch_size=options.evaluation.eval_batch_size,
            num_workers=options.data.num_workers,
            precision=options.evaluation.eval_precision,
            processes=run.processes,
        )
    write_scores(run, kind, block)
    log.info(f"zero-shot {summary(block)}")
    return {name: value for name, value in block.items() if name not in ("per_class", "templates")}


def write_scores(run: Run, kind: str, block: dict[str, Any]) -> None:
    """One line of metrics.jsonl for an evaluation."""
    if run.metrics:
        names = ("i2t", "t2i", "mean_recall", "rsum", "loss", "i2t_accuracy", "t2i_accuracy")
        names += ("top1", "top5", "top10", "mean_per_class")
        scores = {name: block[name] for name in names if name in block}
        run.metrics.write(kind, run.progress.step, scores)


def log_step(run: Run, result: StepResult, rate: float, epoch: int, watch: Stopwatch) -> None:
    """One log line. Asks the device for the numbers, and so waits for it."""
    run.trainer.check_finite()
    loss, scale = result.loss.item(), run.model.clip.logit_scale.exp().item()
    speed, waited = watch.lap()
    values = {
        "epoch": epoch + 1,
        "loss": loss,
        "lr": rate,
        "logit_scale": scale,
        "pairs_per_second": speed,
        "data_percent": waited,
    }
    if run.model.clip.logit_bias is not None:
        values["logit_bias"] = run.model.clip.logit_bias.item()
    accuracy = ""
    if run.collapse is not None and run.collapse.has_collapsed(loss):
        log.warning(
            f"the loss has stayed at {loss:.4f}, chance for a batch of {run.sampler.batch_size}: the features may have "
            "collapsed to one point; start again with a lower --lr or a longer --warmup"
        )
    if run.options.run.report_training_batch_acc:
        values["i2t_accuracy"], values["t2i_accuracy"] = i2t, t2i = result.accuracy(run.processes)
        accuracy = f"accuracy i2t {i2t:.1f} t2i {t2i:.1f}  "
    if run.metrics:
        run.metrics.write("train", run.progress.step, values)
    log.info(
        f"epoch {epoch + 1}  step {run.progress.step}/{run.total_steps}  loss {loss:.4f}  lr {rate:.2e}  "
        f"scale {scale:.2f}  {accuracy}{speed:.1f} pairs/s  data {waited:.0f}%  {run.batch_in_words}"
    )


def save_last(run: Run) -> None:
    """Write last.pt, unless the loss or a weight is not finite: then the one from before stays."""
    run.trainer.check_finite()
    run.trainer.check_weights_finite()
    save(run, "last.pt", make_checkpoint)


def save(run: Run, name: str, content: Callable[[Run], dict[str, Any]]) -> None:
    """Write a checkpoint; of several processes, the main one does."""
    if run.lock is not None:
        run.lock.check()
        try:
            save_checkpoint(run.folder / name, content(run))
        except RunError as error:
            run.lock.check()  # if the folder has just been deleted, that is the reason
            if isinstance(error.__cause__, FileNotFoundError):  # it is being deleted, file by file
                raise run.lock.deleted() from error
            raise


def make_checkpoint(run: Run) -> dict[str, Any]:
    """A checkpoint that a run goes on from."""
    return make_model_checkpoint(run) | training_state(run.trainer, run.sampler, run.progress)


def make_model_checkpoint(run: Run) -> dict[str, Any]:
    """The part of a checkpoint that an evaluation needs."""
    return {
        "model": run.model.weights(),
        "model_config": run.built.config,
        "preprocess": run.built.preprocess,
        "options": with_absolute_paths(without_resume(run.options, run.folder).flat()),
        "epoch": run.progress.step // len(run.sampler),
        "step": run.progress.step,
    }
