"""The memory that a model takes, counted before it is taken."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clip_retrieval.errors import UserError

FACTORIES = ("empty", "zeros", "ones", "full", "rand", "randn", "empty_strided")
MOST_TENSORS = 20_000
"""The largest models have 3,000; those of a billion layers would be built for ever."""


@contextmanager
def must_fit(name: str) -> Iterator[None]:
    """A block that builds a model: UserError, naming it, as soon as it would need more memory than there is."""
    with _Counter(name, _free_bytes()):
        yield


class _Counter(TorchDispatchMode):
    """Sees each tensor that is made before it is."""

    def __init__(self, name: str, free: float):
        super().__init__()
        self._name = name
        self._free = free
        self._bytes = self._tensors = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        options = options or {}
        if function._opname in FACTORIES and torch.device(options.get("device") or "cpu").type == "cpu":
            dtype = options.get("dtype") or torch.get_default_dtype()
            self._bytes += math.prod(arguments[0]) * dtype.itemsize
            self._tensors += 1
            if self._bytes > self._free:
                raise UserError(
                    f"{self._name} needs more than the {self._free / 1e9:.1f} GB of memory that are free; give a "
                    "smaller model"
                )
            if self._tensors > MOST_TENSORS:
                raise UserError(f"{self._name} has more than {MOST_TENSORS:,} tensors; give a model with fewer layers")
        return function(*arguments, **options)


def _free_bytes() -> float:
    """Memory that this process may take; infinite where the system does not tell."""
    free = math.inf
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = sum(1024 * int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError, KeyError):
        pass  # another system; or a control group without a limit ("max")
    return free
