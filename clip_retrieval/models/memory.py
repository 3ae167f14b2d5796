"""The memory that a model takes, counted before it is taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from clip_retrieval.errors import UserError

FACTORIES = ("empty", "zeros", "ones", "full", "rand", "randn", "empty_strided")
MOST_TENSORS = 20_000
"""The largest models have 3,000; those of a billion layers would be built for ever."""
SMALL = 2**16  # numbers


def build_within_memory(make: Callable[[], nn.Module], name: str) -> nn.Module:
    """What `make` builds. Raises UserError, naming the model, if it needs more memory than there is.

    It is built twice, the first time with weights that have a size but no memory, which takes a moment. The random
    numbers are those of the second time.
    """
    free = _free_bytes()
    with torch.random.fork_rng(devices=[]):
        try:
            with _Counter(name, free, weightless=True):
                make()
        except UserError:
            raise
        except Exception:
            pass  # what is wrong, or does not work without values, shows the second time
    with _Counter(name, free):
        return make()


class _Counter(TorchDispatchMode):
    """Sees each tensor that is made before it is.

    Args:
        name: of the model.
        free: bytes that it may take.
        weightless: make tensors that are not small on the meta device.
    """

    def __init__(self, name: str, free: float, *, weightless: bool = False):
        super().__init__()
        self._name = name
        self._free = free
        self._weightless = weightless
        self._bytes = self._tensors = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), options: dict | None = None) -> Any:
        options = dict(options or {})
        if function.overloadpacket.__name__ in FACTORIES and torch.device(options.get("device") or "cpu").type == "cpu":
            numbers = math.prod(arguments[0])
            self._count(numbers * (options.get("dtype") or torch.get_default_dtype()).itemsize)
            if self._weightless and numbers > SMALL:
                options["device"] = "meta"
        return function(*arguments, **options)

    def _count(self, size: int) -> None:
        self._bytes += size
        self._tensors += 1
        if self._bytes > self._free:
            free = f"{self._free / 1e9:.1f} GB"
            raise UserError(f"{self._name} needs more than the {free} of memory that are free; give a smaller model")
        if self._tensors > MOST_TENSORS:
            raise UserError(f"{self._name} has more than {MOST_TENSORS:,} tensors; give a model with fewer layers")


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
