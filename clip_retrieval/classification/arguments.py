"""What was typed: the options that a script has of its own, and values that may be a path or something else."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from clip_retrieval.errors import UserError


def take_values(group: argparse._ArgumentGroup, typed: dict[str, Any], paths: Collection[str] = ()) -> dict[str, Any]:
    """Take the values of a group's options out of what was typed: those in `paths` as a Path, repeated ones as a tuple.

    Raises UserError for an empty one: as a Path it would be the working directory.
    """
    own = {action.dest: typed.pop(action.dest) for action in group._group_actions if action.dest in typed}
    for name, value in own.items():
        if value == "" or (isinstance(value, list) and "" in value):
            raise UserError(f"--{name} is empty; give it a value or leave it out")
        if isinstance(value, list):
            own[name] = tuple(value)
        elif name in paths:
            own[name] = Path(value)
    return own


def is_there(path: str) -> bool:
    """Whether there is such a file or folder. What is typed may also be no path at all, and longer than any."""
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises OSError for a name that is too long
