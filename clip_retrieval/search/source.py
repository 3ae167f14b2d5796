"""Which model an index uses: its options, as they are typed. Loads no torch.

A source is a dict: `options` by name, with absolute paths, and `stamp`, size and time of change (ns) of the checkpoint.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from clip_retrieval.errors import UserError
from clip_retrieval.files import path_exists
from clip_retrieval.options import ModelOptions

INDEX_FOLDER = ".clip_search"
"""Name of an index's folder in the folder of the photographs."""
NAMES = ("resume", "eval_precision", *(field.name for field in dataclasses.fields(ModelOptions)))
"""The options that decide the features."""
LOCAL = "local-dir:"
NUMBERS = ("context_length", "image_size", "keep_positions")


def choose_source(typed: dict[str, Any], record: dict[str, Any] | None) -> dict[str, Any]:
    """Take the options of the model from `typed` and return their source; without any, that of an index's record.

    Raises UserError if there is neither, or the checkpoint is missing.
    """
    given = {name: typed.pop(name) for name in NAMES if name in typed}
    options: Any
    if given:
        options = {name: _make_absolute(value) for name, value in given.items()}
        if isinstance(size := options.get("image_size"), tuple):
            options["image_size"] = list(size)  # as JSON has it
    elif record is None:
        raise UserError("no model: give a checkpoint, --resume CKPT, or a pretrained one, --vision_model ViT-B/32")
    else:
        source = record.get("source")
        options = source.get("options") if isinstance(source, dict) else None
        if not isinstance(options, dict) or not options or not all(_is_valid(*each) for each in options.items()):
            raise UserError("the index does not name its model; give it: --resume CKPT")
    resume = options.get("resume")
    if resume is None:
        return {"options": options, "stamp": []}
    if not _is_path(resume):
        where = "" if given else ", from which the index was made"
        raise UserError(f"{resume}: no such checkpoint{where}; give its path as --resume")
    found = Path(resume).stat()
    return {"options": options, "stamp": [found.st_size, found.st_mtime_ns]}


def _is_valid(name: str, value: Any) -> bool:
    if name == "image_size" and isinstance(value, list):  # height and width
        return len(value) in (1, 2) and all(type(side) is int for side in value)
    return name in NAMES and isinstance(value, int if name in NUMBERS else str)


def _make_absolute(value: Any) -> Any:
    """Make a path absolute, also that of `local-dir:FOLDER`: later commands start in other folders."""
    if isinstance(value, str) and value.startswith(LOCAL) and path_exists(value[len(LOCAL) :]):
        return f"{LOCAL}{Path(value[len(LOCAL) :]).absolute()}"
    return str(Path(value).absolute()) if _is_path(value) else value


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and path_exists(value)
