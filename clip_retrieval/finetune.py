"""Finetune a model: evaluate it, train it, keep the best checkpoint, and report that one.

python main.py --vision_model ViT-B/32 --dataset_root DATA
python main.py --vision_model ViT-B/32 --dataset_root DATA --resume auto    # resume after an interruption
torchrun --nproc_per_node 8 main.py --vision_model ViT-B/32 --dataset_root DATA
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, nullcontext
from typing import Any

from clip_retrieval.data.batches.loader import TrainBatch
from clip_retrieval.device import choose_device, deterministic_algorithms
from clip_retrieval.distributed import process_group
from clip_retrieval.errors import Interrupted, UserError, format_count
from clip_retrieval.log import log, progress_bar, start_log
from clip_retrieval.models.checkpoint import Checkpoint, TrainingCheckpoint
from clip_retrieval.models.lora import merge_lora
from clip_retrieval.reporting.html.write import Evaluated, write_report
from clip_retrieval.reporting.ranks_file import write_ranks
from clip_retrieval.reporting.results import RANKS, REPORT, delete_derived, write_results
from clip_retrieval.reporting.stopwatch import Stopwatch
from clip_retrieval.reporting.table import protocols_table, results_table
from clip_retrieval.reporting.trackers import parse_trackers
from clip_retrieval.retrieval.rankings import save_rankings
from clip_retrieval.run.folder import lock_folder, refuse_another_run, resumes_in, run_folder
from clip_retrieval.run.prepare import Run, prepare
from clip_retrieval.run.progress_log import log_results, log_step
from clip_retrieval.run.saving import make_checkpoint, make_model_checkpoint, save, save_last
from clip_retrieval.run.scoring import score_split, score_zero_shot, write_scores
from clip_retrieval.run.selection import (
    RAW,
    ends,
    evaluate_val,
    save_averages,
    score_retained_split,
    selects_by_zero_shot,
)
from clip_retrieval.run.settings import settle_options
from clip_retrieval.run.teacher import START, START_FILE
from clip_retrieval.signals import StopSignal
from clip_retrieval.training.average import SWA
from clip_retrieval.training.schedule import learning_rate, warmup_steps


def finetune(typed: dict[str, Any], config: dict[str, Any] | None = None) -> None:
    """Finetune a model, keep the best on the val split, and report it.

    Args:
        typed: the options of the command line, by name.
        config: those of --config, if it has been read already.
    """
    start_log()
    options, checkpoint = settle_options(typed, config)
    parse_trackers(options.run.report_to)  # a checkpoint may name one that is not installed here
    folder = run_folder(options.run)
    with (
        StopSignal().handle_signals() as stop,
        process_group(options.run.device) as processes,
        deterministic_algorithms(choose_device(options.run.device), options.train.deterministic),
        lock_folder(folder) if processes.is_main else nullcontext() as lock,
    ):
        # claim the folder: no process reads it before the main process holds the lock
        processes.barrier()
        if checkpoint is not None and resumes_in(folder, options.run.resume):
            checkpoint = Checkpoint.load(checkpoint.path)  # another run may have replaced it before the lock
        can_resume = isinstance(checkpoint, TrainingCheckpoint)
        refuse_another_run(folder, options.run, options.model.pretrained, can_resume=can_resume)
        processes.barrier()

        # read the data, build the model, restore the checkpoint
        with stop.interruptible():
            run = prepare(options, checkpoint, folder, lock, stop, processes)
        if processes.world_size > 1:
            stop.agree = processes.any

        # train, and save if the run is stopped
        with closing(run.metrics) if run.metrics else nullcontext():
            try:
                if options.loss.distill_from == START and not run.progress.step:
                    save(run, START_FILE, make_model_checkpoint)
                evaluate_first(run)
                train(run)
            except KeyboardInterrupt:
                save_last(run)
                raise make_interrupted(run) from None
            except UserError as error:  # damaged data; with several processes, the others do not know of it
                if processes.world_size > 1 or not run.progress.step:
                    raise
                save_last(run)
                saved = f"saved at step {run.progress.step}; once that is fixed, resume with --resume auto"
                raise UserError(f"{error} ({saved})") from None
            try:
                finish(run)
            except KeyboardInterrupt:
                raise make_interrupted(run) from None


def make_interrupted(run: Run) -> Interrupted:
    """Make the error of a run that was stopped and saved."""
    without = ", without --overwrite," if run.options.run.overwrite else ""
    return Interrupted(
        f"interrupted at step {run.progress.step} of {run.schedule.total_steps}, saved; to resume, "
        f"repeat the command{without} with --resume {run.folder / 'last.pt'}"
    )


def evaluate_first(run: Run) -> None:
    """Score the model that the run starts from, on the split that is reported at the end."""
    progress, split = run.progress, run.test or run.val
    if progress.step or run.options.evaluation.no_eval_first:
        return
    if split is not None and not progress.before:
        _, progress.before, _ = score_split(run, split, full=True)
        write_scores(run, "before", progress.before)
        log.info("before training:\n" + results_table({split.dataset.split: progress.before}))
    if run.zero_shot is not None and not progress.zero_shot_before:
        progress.zero_shot_before = score_zero_shot(run, run.zero_shot)
    if run.retention is not None and not progress.retention_before:
        progress.retention_before = score_retained_split(run, run.retention, "retention", full=True)


def train(run: Run) -> None:
    """Train from the step of the checkpoint to the last one."""
    progress, schedule, options = run.progress, run.schedule, run.options.train
    warmup = warmup_steps(options.warmup, schedule.total_steps)

    # resume: complete the milestone at which the run was interrupted; a new folder needs a last.pt of its own
    if progress.step and progress.evaluated_step < progress.step and schedule.is_milestone(progress.step):
        complete_milestone(run)
    elif progress.step and run.processes.any(not (run.folder / "last.pt").exists()):
        save_last(run)

    run.model.train()
    watch = Stopwatch(progress.seconds)
    bar = progress_bar(total=schedule.total_steps, initial=progress.step, desc="steps", lines=False)
    with bar, closing(load_batches(run)) as batches:
        while not ends(run, progress.stale):
            # load
            run.stop.check()
            with run.stop.interruptible(), watch.wait():
                batch = next(batches)
            if progress.step == schedule.small_steps:
                watch.step_seconds = None  # of another image size
            if watch.step_seconds is None and run.trainer.device.type == "cuda":  # on a CPU, steps take too long for it
                with watch.pause():
                    watch.step_seconds = run.trainer.time_step(batch, progress.step + 1)

            # forward, backward, update
            rate = learning_rate(
                progress.step,
                peak=options.lr,
                warmup_steps=warmup,
                total_steps=schedule.total_steps,
                schedule=options.schedule,
                decay_fraction=options.decay_fraction,
            )
            result = run.trainer.step(batch, progress.step + 1, rate)
            progress.step += 1
            if schedule.averages(progress.step):
                run.trainer.averages[SWA].update()
            progress.seconds = watch.seconds
            watch.count(run.sampler.batch_size)
            bar.update()

            # log
            if schedule.logs(progress.step):
                log_step(run, result, rate, watch)

            # save
            if schedule.saves(progress.step):
                save_last(run)

            # evaluate, and keep checkpoints
            if schedule.is_milestone(progress.step):
                with watch.pause():
                    complete_milestone(run)
    if progress.step < schedule.total_steps:
        log.info(f"stopped at step {progress.step}: no new best on val in {format_count(progress.stale, 'evaluation')}")


def load_batches(run: Run) -> Generator[TrainBatch]:
    """Yield this process's batches from the current step on, epoch after epoch."""
    while True:
        epoch, first_batch = divmod(run.progress.step, run.schedule.steps_per_epoch)
        yield from run.loader.epoch(epoch, first_batch)


def complete_milestone(run: Run) -> None:
    """Save, evaluate, keep the best checkpoint and numbered ones, and save again."""
    progress, schedule, step = run.progress, run.schedule, run.progress.step
    stale = progress.stale
    save_last(run)  # an interrupted evaluation costs no step

    # evaluate
    if run.val is not None and schedule.evaluates(step):
        stale = evaluate_val(run, run.val)
    if run.zero_shot is not None and schedule.evaluates_zero_shot(step) and not selects_by_zero_shot(run):
        score_zero_shot(run, run.zero_shot)
    run.model.train()
    progress.evaluated_step, progress.stale = step, stale
    if ends(run, stale):
        save_averages(run)

    # keep numbered checkpoints, before last.pt records the milestone as complete: a resumed run does not repeat it
    make = make_model_checkpoint if run.options.run.keep_weights_only else make_checkpoint
    if schedule.keeps_epoch(step):
        save(run, f"epoch_{step // schedule.steps_per_epoch}.pt", make)
    if schedule.keeps_step(step):
        save(run, f"step_{step}.pt", make)
    save_last(run)


def finish(run: Run) -> None:
    """Load the best model, score it on the test split, and write results.json, and a report if asked for."""
    # load the best model
    progress, best = run.progress, run.folder / "best.pt"
    merge_lora(run.model.clip)
    if progress.best is not None:
        if run.processes.is_main:
            run.model.load_weights(Checkpoint.load(best).model)
        run.processes.broadcast(run.model.weights())
        average = f", {progress.best['average']} weights" if progress.best.get("average", RAW) != RAW else ""
        log.info(f"the best on val is epoch {progress.best['epoch']}, step {progress.best['step']}{average}")

    # score it, and without a test split again on val: evaluations during training have neither intervals nor ranks
    val, final = progress.best["block"] if progress.best else None, run.test or run.val
    encoded = test = ranks = None
    if run.lock is not None:
        delete_derived(run.folder)
    if final is not None:
        encoded, block, ranks = score_split(run, final, full=True)
        if final is run.test:
            test = block
            write_scores(run, "test", test)
        else:
            val = block
        if k := run.options.evaluation.save_rankings:
            save_rankings(run.folder, encoded.images, encoded.captions, final.dataset, k, run.processes)
    blocks: dict[str, Any] = {"before": progress.before, "val": val}
    if run.zero_shot is not None:
        blocks["zero_shot"] = score_zero_shot(run, run.zero_shot, "zero_shot_end")
        blocks["zero_shot_before"] = progress.zero_shot_before
    if run.retention is not None:
        blocks["retention"] = score_retained_split(run, run.retention, "retention_end", full=True)
        blocks["retention_before"] = progress.retention_before

    # write results.json: the scores on the test split are its top-level keys
    results = dict(test or val or {"model": run.built.name, "dataset": run.options.data.name})
    results |= {
        "weights": progress.weights,
        "training_precision": run.trainer.precision,
        "step": progress.best["step"] if progress.best else progress.step,
        "steps": progress.step,
        "seconds": results.get("seconds", {}) | {"training": progress.seconds},
    }
    if progress.best and "average" in progress.best:
        results["average"] = progress.best["average"]
    results |= {name: block for name, block in blocks.items() if block}
    if run.lock is not None:
        run.lock.check()
        write_results(run.folder, results)
        if final and ranks:
            write_ranks(run.folder / RANKS, final.dataset, *ranks)

    # print the table
    log_results(run, {"val": val, "test": test}, blocks)
    if "protocols" in results:
        log.info(protocols_table(results["protocols"]))
    files = [run.folder / name for name in ("results.json", "best.pt", "last.pt", "ema.pt", "swa.pt")]
    log.info(f"wrote {', '.join(str(path) for path in files if path.exists())}")

    # write the report
    if run.options.run.report and run.processes.is_main and final and encoded and ranks:
        name, metrics = run.folder.resolve().name, run.folder / "metrics.jsonl"
        write_report(run.folder / REPORT, Evaluated(name, final.dataset, encoded, ranks, results, metrics))
