"""Checkpoints of ours: what best.pt, last.pt and the numbered checkpoints hold, how they are saved and loaded.

The file is a plain dict of tensors and primitives, which `torch.load(weights_only=True)` reads. It is written
atomically: a crash never leaves half of one. The model's tensors have a second name, `state_dict`, under which
open_clip's `load_checkpoint` finds them; they are stored once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_retrieval import __version__
from clip_retrieval.errors import RunError, UserError, describe
from clip_retrieval.files import write_atomic
from clip_retrieval.models.config_schema import model_config, preprocess
from clip_retrieval.models.schema import (
    SchemaError,
    either,
    entries,
    nothing,
    number,
    one_of,
    record,
    sequence,
    tensor,
    text,
    whole,
)
from clip_retrieval.models.schema import fields as field_checks
from clip_retrieval.models.tensor_files import read_tensor_file
from clip_retrieval.options import GROUPS

ADAPTOR = "adaptor."
"""Prefix of an adaptor's weights, which open_clip does not know."""

FORMAT = 2
"""Increased when an older version of the package cannot read a checkpoint any more."""


@dataclass
class Checkpoint:
    """A checkpoint of ours.

    Attributes:
        model: state dict, float32.
        model_config: open_clip's model config.
        preprocess: open_clip's PreprocessCfg.
        options: all options, by name.
        epoch, step: how many are complete.
        val: the results block of the val split, in best.pt.
        format: FORMAT of the version that wrote it.
        version: of the package that wrote it; None before these were recorded.
        path: the file that it was loaded from; not part of the content.
    """

    model: dict[str, Tensor]
    model_config: dict[str, Any]
    preprocess: dict[str, Any]
    options: dict[str, Any]
    epoch: int
    step: int
    val: dict[str, Any] | None = None
    format: int = FORMAT
    version: str | None = __version__
    path: Path = Path()

    def save(self, path: Path) -> None:
        """Save it atomically. Raises RunError if it cannot be written; the file from before is kept."""
        content = {name: value for name, value in vars(self).items() if value is not None and name != "path"}
        content["state_dict"] = without_adaptor(self.model)
        try:
            with write_atomic(path) as file:
                torch.save(content, file)
        except (OSError, RuntimeError) as error:
            # torch closes a file that it could not write with a RuntimeError, whose context is the OSError
            cause = error.__context__ if isinstance(error, RuntimeError) else error
            if not isinstance(cause, OSError):
                raise
            raise RunError(
                f"could not write {path} ({describe(cause)}); the checkpoint from before is kept. Free some space or "
                "check the disk, then resume with --resume auto"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Checkpoint:
        """Load a checkpoint of ours. Raises UserError as `load_if_ours`, and if the file is something else."""
        checkpoint = cls.load_if_ours(path)
        if checkpoint is None:
            raise UserError(f"{path} is not a checkpoint of this tool")
        return checkpoint

    @classmethod
    def load_if_ours(cls, path: str | Path) -> Checkpoint | None:
        """Load a checkpoint; None if the file is something else, such as another system's weights.

        Raises UserError if the file is missing or damaged, holds Python objects, or is of a newer format.
        """
        path = Path(path)
        file = read_tensor_file(path)
        return None if file.is_torchscript else cls.from_content(path, file.content)

    @classmethod
    def from_content(cls, path: Path, content: Any) -> Checkpoint | None:
        """Make a checkpoint from the content of a file; None if it is something else. Raises UserError as above."""
        if not isinstance(content, dict) or "model" not in content or "model_config" not in content:
            return None
        cls.check(path, content)
        kind = TrainingCheckpoint if "optimizer" in content else Checkpoint
        known = {f.name: content[f.name] for f in fields(kind) if f.name in content}  # a later version may add entries
        return kind(**{"format": FORMAT, "version": None, **known, "path": path})

    @staticmethod
    def check(path: Path, content: dict[str, Any]) -> None:
        """Raise UserError, naming the file, unless every entry has a known name and a valid type and shape."""
        written = content.get("format", FORMAT)
        if type(written) is int and written > FORMAT:
            raise UserError(
                f"{path} was written by a newer version of clip_retrieval (format {written}, here {FORMAT}); update "
                "the package"
            )
        try:
            (_WITH_TRAINING if "optimizer" in content else _MODEL_ONLY)(content, "")
            _check_state_dict(content)
        except SchemaError as error:
            raise UserError(f"{path} is a damaged checkpoint: {error}; give another one") from None


@dataclass(kw_only=True)
class TrainingCheckpoint(Checkpoint):
    """A checkpoint that a run resumes from.

    Attributes:
        optimizer, scaler: their state dicts.
        learning: the trainable parameters, in order, with their shapes.
        random: seed and step, from which all random numbers of a step follow.
        sampler: epoch, batch, the options that decide the order, and a checksum of the data; the
            `order` of an epoch that follows from the weights at its start, int32 (batches, batch_size).
        progress: fields of `training.state.Progress`.
        lora: frozen weights, A and B, with --trainable lora; in `model` they are merged.
        averages: of the trainable weights (--ema, --swa_start), by name: their updates and weights; None without any.
    """

    optimizer: dict[str, Any]
    learning: dict[str, list[int]]
    scaler: dict[str, Any]
    random: dict[str, int]
    sampler: dict[str, Any]
    progress: dict[str, Any]
    lora: dict[str, Tensor] | None = None
    averages: dict[str, Any] | None = None


def without_adaptor(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the part of a checkpoint's state dict that open_clip's model has."""
    return {name: value for name, value in model.items() if not name.startswith(ADAPTOR)}


def _check_state_dict(content: dict[str, Any]) -> None:
    """Raise SchemaError if open_clip would read other weights than this package."""
    model = without_adaptor(content["model"])
    state = content.get("state_dict", model)
    if state.keys() != model.keys():
        raise SchemaError("state_dict and model have different names")
    for name, value in state.items():
        own = model[name]
        if value is not own and not (value.dtype == own.dtype and _is_equal(value, own)):
            raise SchemaError(f"state_dict.{name} differs from model.{name} (drop state_dict if model is right)")


def _is_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype are equal. NaN equals NaN: weights that are not finite have an own error."""
    if torch.equal(a, b) or a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


_METRICS = record(required=dict.fromkeys(("R@1", "R@5", "R@10", "MedR", "MeanR"), number()), rest=number())
_RESULTS = record(required={"split": text, "i2t": _METRICS, "t2i": _METRICS, "mean_recall": number(), "rsum": number()})


def check_results(value: Any, place: str) -> None:
    """Check a block of results.json: both directions must have the same metrics."""
    _RESULTS(value, place)
    if value["i2t"].keys() != value["t2i"].keys():
        raise SchemaError(f"{place} has different metrics for i2t and t2i")


_MODEL = {
    "model": entries(tensor),
    "model_config": model_config,
    "preprocess": preprocess,
    "options": record(
        required={"vision_model": text},
        optional=field_checks(*GROUPS.values()) | {"dataset": either(text, sequence(text, empty=False))},
    ),
    "epoch": whole(),
    "step": whole(),
}

_SCALER = record(
    required={
        **dict.fromkeys(("scale", "growth_factor", "backoff_factor"), number(above=0)),
        **dict.fromkeys(("growth_interval", "_growth_tracker"), whole()),
    }
)

_TRAINING = {
    "optimizer": record(
        required={
            "state": entries(entries(tensor), key=int),
            "param_groups": sequence(record(required={"params": sequence(whole()), "lr": number()})),
        }
    ),
    "learning": entries(sequence(whole())),
    "scaler": either(one_of({}), _SCALER),
    "random": record(required={"seed": whole(), "step": whole()}),
    "sampler": record(required={"data": either(text, whole())}, optional={"order": tensor}),
    "progress": record(
        optional={
            "step": whole(),
            "evaluated_step": whole(),
            "best": either(
                nothing,
                record(
                    required={"step": whole(), "epoch": whole(), "block": check_results},
                    optional={"average": text, "retention": number()},
                ),
            ),
            "stale": whole(),
            "before": either(nothing, check_results),
            "retention_before": either(nothing, check_results),
            "zero_shot_before": either(nothing, record()),
            "seconds": number(),
        }
    ),
}

_OPTIONAL = {"state_dict": entries(tensor), "format": whole(1, FORMAT), "version": text}
_MODEL_ONLY = record(required=_MODEL, optional={"val": check_results, **_OPTIONAL})
_AVERAGES = entries(record(required={"updates": whole(), "weights": entries(tensor)}))
_WITH_TRAINING = record(
    required={**_MODEL, **_TRAINING}, optional={"lora": entries(tensor), "averages": _AVERAGES, **_OPTIONAL}
)
