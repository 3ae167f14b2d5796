"""The options that say which model an index uses, and where they are recorded. Loads no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_retrieval.errors import UserError
from clip_retrieval.files import path_exists
from clip_retrieval.options import ModelOptions

INDEX_FOLDER = ".clip_search"
"""Name of an index's folder in the folder of the photographs."""
NAMES = ("resume", "eval_precision", *(field.name for field in dataclasses.fields(ModelOptions)))
"""The options that decide the features."""


@dataclass(frozen=True)
class ModelSource:
    """The options of a model, as they are given to main.py.

    Attributes:
        options: the options; paths are absolute.
        stamp: size and time of the last change (ns) of the checkpoint, if there is one.
    """

    options: dict[str, Any]
    stamp: tuple[int, ...] = ()

    def record(self) -> dict[str, Any]:
        """The source as JSON."""
        return {"options": self.options, "stamp": list(self.stamp)}

    def describe(self) -> str:
        """Words for messages: the options as they are typed."""
        return " ".join(f"--{name} {value}" for name, value in self.options.items())


def choose_source(typed: dict[str, Any], record: dict[str, Any] | None) -> ModelSource:
    """Return the model that was typed, else the one of an index's record.

    Removes the options of the model from `typed`. Raises UserError if there is neither, or a checkpoint is missing.
    """
    given = {name: typed.pop(name) for name in NAMES if name in typed}
    if given:
        options = {name: _absolute(value) for name, value in given.items()}
    elif record is None:
        raise UserError("no model: give a checkpoint, --resume CKPT, or a pretrained one, --vision_model ViT-B/32")
    else:
        options = _read_options(record)
    resume = options.get("resume")
    if resume is None:
        return ModelSource(options)
    if not path_exists(resume):
        where = "" if given else ", from which the index was made"
        raise UserError(f"{resume}: no such checkpoint{where}; give its path as --resume")
    found = Path(resume).stat()
    return ModelSource(options, (found.st_size, found.st_mtime_ns))


def _read_options(record: dict[str, Any]) -> dict[str, Any]:
    source = record.get("source")
    options = source.get("options") if isinstance(source, dict) else None
    if (
        not isinstance(options, dict)
        or not options
        or not all(name in NAMES and isinstance(value, (str, int)) for name, value in options.items())
    ):
        raise UserError("the index does not say which model it is of; give it: --resume CKPT")
    return options


def _absolute(value: Any) -> Any:
    return str(Path(value).absolute()) if isinstance(value, str) and path_exists(value) else value
