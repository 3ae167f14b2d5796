"""Build a model only if it fits into the free memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from clip_retrieval.errors import UserError
from clip_retrieval.memory import free_memory

FACTORIES = ("empty", "zeros", "ones", "full", "rand", "randn", "empty_strided")
SMALL = 2**16  # numbers
LARGE = 4
"""A model that needs more than 1/LARGE of the free memory is large."""

MOST_TENSORS = 20_000
"""The largest models have 3,000; building a billion layers would never end."""


def build_within_memory(build: Callable[[], nn.Module], name: str) -> nn.Module:
    """Return `build()`, on the CPU.

    A large module is first built on the meta device, which needs no memory. Raises UserError, naming the model, if it
    needs more memory than is free.
    """
    free = free_memory()
    random_state = torch.get_rng_state()
    try:
        with _Counter(name, free / LARGE):
            return build()
    except UserError:
        torch.set_rng_state(random_state)
    try:
        with torch.random.fork_rng(devices=[]), _Counter(name, free, on_meta=True):
            build()
    except UserError:
        raise
    except Exception:  # some models read a value while they are built; meta tensors have none
        pass
    with _Counter(name, free):
        return build()


class _Counter(TorchDispatchMode):
    """Counts new tensors and their bytes. Raises UserError before there are too many.

    With on_meta, tensors that are not small are created on the meta device.
    """

    def __init__(self, name: str, free: float, *, on_meta: bool = False):
        super().__init__()
        self._name = name
        self._free = free
        self._on_meta = on_meta
        self._bytes = self._tensors = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        options = dict(options or {})
        if function._opname in FACTORIES and torch.device(options.get("device") or "cpu").type == "cpu":
            count, dtype = math.prod(arguments[0]), options.get("dtype") or torch.get_default_dtype()
            if self._on_meta and count > SMALL:
                options["device"] = "meta"
            self._bytes += count * dtype.itemsize
            self._tensors += 1
            if self._bytes > self._free:
                raise UserError(
                    f"{self._name} needs more than the {self._free / 1e9:.1f} GB of free memory; give a smaller model"
                )
            if self._tensors > MOST_TENSORS:
                raise UserError(f"{self._name} has more than {MOST_TENSORS:,} tensors; give a model with fewer layers")
        return function(*arguments, **options)
