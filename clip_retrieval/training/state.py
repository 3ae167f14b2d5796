"""Save and restore the training state of a run: optimizer, sampler and progress."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip_retrieval.data.batches.sampler import BatchSampler, Sampler
from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.models.checkpoint import Checkpoint, TrainingCheckpoint
from clip_retrieval.models.lora import load_lora, lora_state
from clip_retrieval.training.average import EMA, SWA
from clip_retrieval.training.optimizer import moment_names
from clip_retrieval.training.trainer import Trainer


@dataclass
class Progress:
    """The progress of a run, and its results so far.

    Attributes:
        step: steps done.
        evaluated_step: the last step whose milestone is complete.
        best: step, epoch and results block of the best model on val, and its `average` of the weights if there are any.
        before: results block of the initial model.
        zero_shot_before: results block of its zero-shot classification.
        retention_before: results block of the initial model on --retention_dataset.
        seconds: time spent on training.
        stale: evaluations on val since the best one.
        weights: source of the initial weights, as in results.json; None if the checkpoint does not record it.
    """

    step: int = 0
    evaluated_step: int = 0
    best: dict[str, Any] | None = None
    before: dict[str, Any] | None = None
    zero_shot_before: dict[str, Any] | None = None
    retention_before: dict[str, Any] | None = None
    seconds: float = 0.0
    stale: int = 0
    weights: str | None = None

    def kept_lines(self) -> dict[str, int]:
        """Return the last step of each kind in metrics.jsonl that a resumed run keeps."""
        if self.step == 0 and not (self.before or self.zero_shot_before or self.retention_before):
            return {}
        before = 0 if self.before else -1
        zero_shot = self.evaluated_step or (0 if self.zero_shot_before else -1)
        retention = self.evaluated_step or (0 if self.retention_before else -1)
        kept = {"before": before, "train": self.step, "val": self.evaluated_step}
        kept |= {"zero_shot": zero_shot, "retention": retention}
        averages = {f"{kind}_{name}": kept[kind] for kind in ("val", "zero_shot", "retention") for name in (EMA, SWA)}
        return kept | averages


def training_state(trainer: Trainer, sampler: Sampler, progress: Progress) -> dict[str, Any]:
    """Return the further fields of a `TrainingCheckpoint`, as plain tensors and primitives."""
    epoch, batch = divmod(progress.step, len(sampler))
    order = {}
    if batch and sampler.order is not None:  # within an epoch, it does not follow from these weights
        order = {"order": torch.from_numpy(sampler.order[1]).int()}
    return {
        "optimizer": trainer.optimizer.state_dict(),
        "learning": trainer.trainable_shapes,
        "scaler": trainer.scaler.state_dict(),
        "random": {"seed": trainer.seed, "step": progress.step},  # all random numbers of a step follow from these
        "sampler": {"epoch": epoch, "batch": batch, "data": sampler.fingerprint, **sampler.settings, **order},
        "progress": asdict(progress),
        "lora": lora_state(trainer.model.clip),
        "averages": {name: average.state_dict() for name, average in trainer.averages.items()} or None,
    }


def restore_training(
    checkpoint: Checkpoint,
    trainer: Trainer,
    sampler: Sampler,
    *,
    reset_optimizer: bool = False,
    reset_data_offset: bool = False,
) -> Progress:
    """Restore the optimizer and the scaler from a checkpoint, and return its progress.

    Raises UserError, naming the file, if the run cannot be resumed with these options and data.
    """
    source = checkpoint.path
    if not isinstance(checkpoint, TrainingCheckpoint):
        log.info(f"{source} contains a model without its optimizer: its weights start a new run")
        return Progress()
    # check the options that determine the order of the pairs (missing names belong to other data: see below)
    stored = {name: checkpoint.sampler.get(name, value) for name, value in sampler.settings.items()}
    if stored != sampler.settings and not reset_data_offset:
        differing = {name: value for name, value in stored.items() if value != sampler.settings[name]}
        typed = [f"no --{name}" if value is None else f"--{name} {value}" for name, value in differing.items()]
        raise UserError(
            f"{source} was trained with {' '.join(typed)} and resumes only with that; to change it add "
            "--reset_data_offset, or start a new run from its weights (--pretrained)"
        )
    # check the data
    if checkpoint.sampler["data"] != sampler.fingerprint and not reset_data_offset:
        raise UserError(
            f"{source} was trained on other data and cannot resume with these; restore the data, or "
            "add --reset_data_offset"
        )
    # restore the optimizer; AdamW would read out of bounds with moments of another shape
    if not reset_optimizer:
        optimizer = checkpoint.options.get("optimizer", "adamw")
        if optimizer != trainer.optimizer_name:
            raise UserError(
                f"{source} was trained with --optimizer {optimizer} and resumes only with that; to change it add "
                "--reset_optimizer, or start a new run from its weights (--pretrained)"
            )
        if checkpoint.learning != trainer.trainable_shapes:
            raise UserError(
                f"{source}: its trainable parameters or their shapes differ; use the --trainable, --lora_*, "
                "--freeze_*, --unlocked_*, --loss, --temperature, --image_size and --context_length of that run, or "
                "add --reset_optimizer"
            )
        _check_moments(checkpoint.optimizer, trainer.optimizer, source)
        load_lora(trainer.model.clip, checkpoint.lora, source)
        trainer.load_optimizer(checkpoint.optimizer, checkpoint.scaler)
        for name, state in (checkpoint.averages or {}).items():
            if name in trainer.averages:
                trainer.averages[name].load_state_dict(state, str(source))
    if reset_data_offset:
        return Progress()
    log.info(f"resuming from {source}, step {checkpoint.step}")
    epoch, batch = divmod(checkpoint.step, len(sampler))
    if isinstance(sampler, BatchSampler) and sampler.hard_negatives and batch:
        sampler.order = (epoch, _read_order(checkpoint, sampler))
    # restore the progress, without fields of a newer version
    return Progress(**{f.name: checkpoint.progress[f.name] for f in fields(Progress) if f.name in checkpoint.progress})


def _read_order(checkpoint: TrainingCheckpoint, sampler: BatchSampler) -> np.ndarray:
    """Return the batches of the epoch: int64 (batches, batch_size). Raises UserError if they are missing or invalid."""
    order = checkpoint.sampler.get("order")
    shape, pairs = (len(sampler), sampler.batch_size), len(sampler.dataset.pairs)
    is_order = isinstance(order, torch.Tensor) and order.shape == shape and order.dtype == torch.int32
    if order is None or not is_order or order.min() < 0 or order.max() >= pairs:
        raise UserError(
            f"{checkpoint.path} lacks the order of its epoch, which --hard_negatives needs; add --reset_data_offset"
        )
    return order.numpy().astype(np.int64)


def _check_moments(stored: dict[str, Any], optimizer: torch.optim.Optimizer, source: Path) -> None:
    """Raise UserError, naming `source`, if the state does not fit these parameters. AdamW does not check shapes."""
    names = moment_names(optimizer)
    groups, stored_groups = optimizer.state_dict()["param_groups"], stored["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    problem = None
    is_same = [list(group["params"]) for group in stored_groups] == [group["params"] for group in groups]
    # groups without names are those of an older version, which had no other rates
    if not is_same or any(old.get("names", own["names"]) != own["names"] for old, own in zip(stored_groups, groups)):
        problem = "its parameter groups differ"
    for number, state in stored["state"].items():
        if not 0 <= number < len(parameters):
            problem = f"unexpected parameter {number}"
        elif problem is None and not _is_valid_state(state, parameters[number], names[number]):
            problem = f"parameter {number} has invalid keys, shapes, dtypes or values"
    if problem:
        raise UserError(f"{source}: its optimizer state does not fit ({problem}); add --reset_optimizer")


def _is_valid_state(state: dict[str, torch.Tensor], parameter: torch.Tensor, names: tuple[str, ...]) -> bool:
    """Whether the optimizer can continue with this state of a parameter, which must have these names."""
    if state.keys() != set(names):
        return False
    for name, value in state.items():
        if value.dtype != torch.float32 or value.shape != (() if name == "step" else parameter.shape):
            return False
    if "step" in state and not 0 <= state["step"].item() < math.inf:
        return False
    # NaN or negative mean squares would make the weights NaN.
    moments = [(name, value.min()) for name, value in state.items() if value.numel()]
    return not any(least.isnan() or (name == "exp_avg_sq" and least < 0) for name, least in moments)
