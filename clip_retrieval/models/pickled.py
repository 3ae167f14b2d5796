"""Objects that a pickle in a weight file may hold besides plain values: dtypes, storages, modules."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

# torch's own table; tensors of its quantised dtypes are Unusable
STORAGES = {
    f"torch.{device}{name}": dtype
    for name, dtype in torch.storage._storage_type_to_dtype_map().items()
    for device in ("", "cuda.")
}
STORAGES |= {f"torch.storage.{name}Storage": torch.uint8 for name in ("Untyped", "Typed")}

_DTYPE_NAMES = ["float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool"]
_DTYPE_NAMES += ["complex64", "complex128", "uint16", "uint32", "uint64"]
_DTYPE_NAMES += ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
DTYPES = {f"torch.{name}": getattr(torch, name) for name in _DTYPE_NAMES}

_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
"""Names of one module, before and since NumPy 2."""

UNUSABLE = {
    **{f"{module}._reconstruct": "a NumPy array" for module in _NUMPY},
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, without values",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device",
}
NUMPY_SCALARS = tuple(f"{module}.scalar" for module in _NUMPY)
TYPE_NAME = re.compile(r"torch\.(u?int|float|bits|qu?int|per_)\w+|torch\.Tensor|numpy\.ndarray")
"""Names that are never called: other dtypes, quantisation schemes and array types."""


class PythonObjectError(Exception):
    """A pickle holds a Python object of this name."""


class DamagedError(Exception):
    """A damaged file: truncated, or with invalid values."""

    def __init__(self, problem: str, remedy: str = "fetch it again"):
        super().__init__(f"{problem}; {remedy}")


@dataclass(frozen=True)
class Global:
    """A global name in a pickle. It is never imported."""

    name: str


@dataclass
class Module:
    """An object of a TorchScript archive.

    Attributes:
        name: name of its class.
        attributes: dict of its attributes; for a class with its own `__setstate__`, the argument of that.
    """

    name: str
    attributes: Any = field(default_factory=dict)


@dataclass
class NumpyType:
    """A dtype of NumPy: its kind and size in bytes (`f8`), and its byte order."""

    code: str
    order: str = "="

    def read(self, content: bytes) -> bool | int | float | complex | Unusable:
        """Return the number in these bytes. Raises ValueError if they are too few or too many."""
        if not _NUMBER.fullmatch(self.code):
            return Unusable(f"a NumPy value of dtype {self.code}")
        (number,) = np.frombuffer(content, np.dtype(self.order + self.code))
        return number.item()


_NUMBER = re.compile("b1|[iu][1248]|f[248]|c8|c16")


@dataclass(frozen=True)
class Unusable:
    """A tensor of a `kind` that cannot be read as plain numbers."""

    kind: str

    def problem(self, name: str) -> str:
        """Return the problem of the tensor `name`, and the remedy."""
        if "meta" in self.kind:
            return f"{name} is {self.kind}; save the model after its weights are loaded"
        return f"{name} is {self.kind}; save it as a dense tensor (.to_dense(), .dequantize(), torch.from_numpy())"


@dataclass(frozen=True)
class Storage:
    """A storage that tensors share: its name in the file, its dtype and its number of elements."""

    key: str
    dtype: torch.dtype
    count: int
