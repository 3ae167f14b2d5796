"""Make and save the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Callable

from clip_retrieval.errors import RunError
from clip_retrieval.models.checkpoint import Checkpoint, TrainingCheckpoint
from clip_retrieval.run.folder import without_resume
from clip_retrieval.run.prepare import Run
from clip_retrieval.run.settings import with_absolute_paths
from clip_retrieval.training.state import training_state


def save_last(run: Run) -> None:
    """Save last.pt. Raises RunError, and keeps the old last.pt, if the loss or a weight is not finite."""
    run.trainer.check_finite()
    run.trainer.check_weights_finite()
    save(run, "last.pt", make_checkpoint)


def save(run: Run, name: str, make: Callable[[Run], Checkpoint]) -> None:
    """Save a checkpoint; only the main process writes. Raises RunError if it cannot be written."""
    if run.lock is None:
        return
    run.lock.check()
    try:
        make(run).save(run.folder / name)
    except RunError as error:
        run.lock.check()  # a deleted folder is the better reason
        if isinstance(error.__cause__, FileNotFoundError):  # the folder is being deleted, file by file
            raise run.lock.deleted() from error
        raise


def make_checkpoint(run: Run) -> TrainingCheckpoint:
    """Make a checkpoint that can resume the run."""
    state = training_state(run.trainer, run.sampler, run.progress)
    return TrainingCheckpoint(**vars(make_model_checkpoint(run)), **state)


def make_model_checkpoint(run: Run) -> Checkpoint:
    """Make a checkpoint for evaluation only, without the training state."""
    return Checkpoint(
        model=run.model.weights(),
        model_config=run.built.config,
        preprocess=run.built.preprocess,
        options=with_absolute_paths(without_resume(run.options, run.folder).flat()),
        epoch=run.progress.step // len(run.sampler),
        step=run.progress.step,
    )
