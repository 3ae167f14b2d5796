"""What a pickle in a weight file may hold besides plain values: types of numbers, tensors of other kinds, modules."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch

_STORAGE_TYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
STORAGES = {f"torch.{device}{name}Storage": dtype for device in ("", "cuda.") for name, dtype in _STORAGE_TYPES.items()}
STORAGES |= {f"torch.storage.{name}Storage": torch.uint8 for name in ("Untyped", "Typed")}
# Tensors of these are Unusable.
STORAGES |= {f"torch.{name}Storage": getattr(torch, name.lower()) for name in ("QInt8", "QUInt8", "QInt32")}

_DTYPE_NAMES = ("float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool")
_DTYPE_NAMES += ("complex64", "complex128", "uint16", "uint32", "uint64")
_DTYPE_NAMES += ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
DTYPES = {f"torch.{name}": getattr(torch, name) for name in _DTYPE_NAMES}

UNUSABLE = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, without values",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device",
}
TYPE_NAME = re.compile(r"torch\.(u?int|float|bits|qu?int|per_)\w+|torch\.Tensor")
"""Names that are never called: further types of numbers, and ways to quantise them."""


class PythonObjectError(Exception):
    """A pickle asks for a Python object: holds its name."""


class DamagedError(Exception):
    """A file that no program wrote: cut short, or with values in the wrong places.

    Args:
        what: is wrong.
        remedy: what to do about it.
    """

    def __init__(self, what: str, remedy: str = "fetch it again"):
        super().__init__(f"{what}; {remedy}")


@dataclass(frozen=True)
class Global:
    """A name in a pickle. It is never looked up in Python."""

    name: str


@dataclass
class Module:
    """An object of a TorchScript archive.

    Attributes:
        name: of its class.
        attributes: a dict of them; of a class with a `__setstate__` of its own, the state that this would be given.
    """

    name: str
    attributes: Any = field(default_factory=dict)


@dataclass
class OldParameter:
    """A parameter as torch saved it until 2017: made first, then given its tensor."""

    data: Any = None


@dataclass(frozen=True)
class Unusable:
    """A tensor that cannot be read as plain numbers, and why."""

    kind: str

    def problem(self, name: str) -> str:
        """What is wrong with it under this name, and the remedy."""
        return f"{name} is {self.kind}; save it as a plain one (.to_dense(), .dequantize())"


@dataclass(frozen=True)
class Storage:
    """The numbers that tensors share: `key` names them in the file.

    Attributes:
        key: their name in the file.
        dtype: their type.
        count: how many there are.
    """

    key: str
    dtype: torch.dtype
    count: int
