"""Find the weights of a model in the content of a weight file, below any holders and prefixes.

Training code wraps a state dict in dicts (`state_dict`, `model_ema`) and in prefixes of its names (`module.`,
`model.`). Both are levels of one tree, whatever their names are. A model is at the highest level whose names are those
of a known model; the levels above it are its key: `state_dict.model`.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from clip_retrieval.models.pickled import Unusable

if TYPE_CHECKING:
    from clip_retrieval.models.model_config import State

MOST_LEVELS, MOST_HOLDERS = 8, 1000
"""Limits of the search in crafted files."""

_OPTIMIZER = re.compile("optim|sched", re.IGNORECASE)
_AVERAGED = re.compile(r"(?:^|_)(?:ema|swa|avg|averaged?)(?:_|$)")
_ANYWHERE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Wrappers of any module: torch.compile's, FSDP's and activation checkpointing's."""
_SUBMODULE = re.compile(r"^([^.]+)\.module\.")
"""DistributedDataParallel of one tower. Deeper, `module` is a name of some timm models."""

_FACTS = ("n_averaged", "input_resolution", "context_length", "vocab_size")
"""Numbers among the weights: AveragedModel's count, and the sizes in OpenAI's archives."""


@dataclass(frozen=True)
class FoundState:
    """The weights of one model in a file.

    Attributes:
        path: the holders and prefixes above it.
        state: tensors by the model's own names; `Unusable` for those that are not plain numbers.
        beside: names in the same dict that belong to no model.
    """

    path: tuple[str, ...]
    state: dict[str, Any]
    beside: list[str]

    @property
    def key(self) -> str:
        """The value of --pretrained_key for these weights."""
        return ".".join(self.path) or "."

    @property
    def is_averaged(self) -> bool:
        """Whether they are an average over training (EMA, SWA)."""
        return any(map(_AVERAGED.search, self.path))

    def has_key(self, key: str) -> bool:
        """Whether `key` is this key, or the levels that it begins with."""
        return f"{self.key}.".startswith(f"{key}.")


def find_states(content: Any, is_model: Callable[[State], bool]) -> list[FoundState]:
    """Find the models in the content of a file, averaged weights first.

    Args:
        content: the content, as `read_tensor_file` returns it.
        is_model: whether the names of a state dict are a model's.
    """
    found = [each for path, holder in holders(content) for each in _split(path, tensors_of(holder), is_model)]
    return sorted(found, key=lambda each: not each.is_averaged)


def holders(content: Any) -> Iterator[tuple[tuple[str, ...], dict[Any, Any]]]:
    """Yield a dict and the dicts in it with their paths, breadth first, except the state of an optimizer."""
    queue: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    seen: set[int] = set()
    while queue and len(seen) < MOST_HOLDERS:
        path, holder = queue.popleft()
        if not isinstance(holder, dict) or id(holder) in seen:
            continue
        seen.add(id(holder))
        yield path, holder
        if len(path) < MOST_LEVELS:
            inner = (key for key, value in holder.items() if isinstance(key, str) and isinstance(value, dict))
            queue += (((*path, key), holder[key]) for key in inner if not _OPTIMIZER.search(key))


def tensors_of(holder: dict[Any, Any]) -> dict[str, Any]:
    """Return the tensors of a dict, plain or `Unusable`, under string keys."""
    return {
        name: value
        for name, value in holder.items()
        if isinstance(name, str) and isinstance(value, (torch.Tensor, Unusable))
    }


def _split(path: tuple[str, ...], state: dict[str, Any], is_model: Callable[[State], bool]) -> list[FoundState]:
    """Split a state dict into the models below its prefixes."""
    models: dict[tuple[str, ...], dict[str, Any]] = {}
    beside: list[str] = []
    level = {path: {_ANYWHERE.sub("", name): value for name, value in state.items()}}
    while level and len(next(iter(level))) <= len(path) + MOST_LEVELS:
        below: dict[tuple[str, ...], dict[str, Any]] = {}
        for prefix, group in level.items():
            group = {_SUBMODULE.sub(r"\1.", name): value for name, value in group.items() if name not in _FACTS}
            own = is_model(group)
            for name, value in group.items():
                head, _, rest = name.partition(".")
                # a model may hold its own average
                if own and not _AVERAGED.search(head):
                    models.setdefault(prefix, {})[name] = value
                elif rest:
                    below.setdefault((*prefix, head), {})[rest] = value
                else:
                    beside.append(".".join((*prefix[len(path) :], name)))
        level = below
    return [FoundState(prefix, model, beside) for prefix, model in models.items()]
