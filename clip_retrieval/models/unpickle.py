"""Read pickles of plain values and tensors without running anything.

Python's unpickler imports the names in a pickle and calls them. This one knows only the names in weight files: each is
an entry of a table, here or in `pickled`, and a pickle with any other name is refused. pickletools parses the
operations; those in the pickles of `torch.save` and `torch.jit.save` (protocol 2) are supported.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from clip_retrieval.models.pickled import (
    DTYPES,
    NUMPY_SCALARS,
    STORAGES,
    TYPE_NAME,
    UNUSABLE,
    DamagedError,
    Global,
    Module,
    NumpyType,
    PythonObjectError,
    Storage,
    Unusable,
)

MOST_OPCODES = 2_000_000
"""A checkpoint has thousands; each may take a hundred bytes of memory."""

MOST_DIMENSIONS = 64
LARGEST = 2**62
MODULE_CLASSES = "__torch__."


class MakeTensor(Protocol):
    """Makes a tensor from a part of a storage, or raises DamagedError."""

    def __call__(
        self, storage: Storage, offset: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype | None
    ) -> torch.Tensor | None: ...


class Unpickler:
    """Reads one pickle after another from bytes in memory.

    Args:
        content: the bytes; after `load`, `file` is at the end of the pickle.
        make_tensor: called for each tensor.
        modules: whether TorchScript's own classes are read, as `Module`.
    """

    def __init__(self, content: bytes, make_tensor: MakeTensor, *, modules: bool = False):
        self.file = io.BytesIO(content)
        self.storages: dict[str, Storage] = {}
        """Storages found so far, by key."""
        self._make_tensor = make_tensor
        self._modules = modules
        self._left = MOST_OPCODES

    def load(self) -> Any:
        """Read a pickle: None, bool, int, float, str, bytes, list, tuple, dict, Tensor, Unusable, Module, Global.

        NumPy's numbers are plain ones. Dicts keep only strings and small integers as keys. Raises PythonObjectError or
        DamagedError.
        """
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        try:
            for opcode, argument, _ in pickletools.genops(self.file):
                self._left -= 1
                if self._left < 0:
                    raise DamagedError(f"a pickle of more than {MOST_OPCODES:,} parts")
                if opcode.name in _VALUES:
                    self._push(argument)
                elif opcode.name in _HANDLERS:
                    _HANDLERS[opcode.name](self, argument)
                else:
                    raise PythonObjectError(f"opcode {opcode.name}")
            return self._stack.pop()
        except (IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise DamagedError(str(error)) from error

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _mark(self, _: None) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _tuple(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        if len(items) < count:
            raise DamagedError("a tuple with too few items")
        self._stack[-count:] = [items]

    def _append(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise DamagedError("items for something that is not a list")
        self._stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        holder = self._stack[-1]
        if type(holder) is not dict:
            raise DamagedError("entries for something that is not a dict")
        _fill(holder, zip(items[::2], items[1::2], strict=True))

    def _global(self, words: str) -> None:
        name = words.replace(" ", ".").replace("__builtin__.", "builtins.", 1)
        is_known = any(name in table for table in (_MAKERS, UNUSABLE, STORAGES, DTYPES))
        if not is_known and not TYPE_NAME.fullmatch(name) and not (self._modules and name.startswith(MODULE_CLASSES)):
            raise PythonObjectError(name)
        self._push(Global(name))

    def _call(self, _: None) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(function) is not Global or type(arguments) is not tuple:
            raise DamagedError("a call of something that is not a function")
        self._push(self._make(function.name, arguments))

    def _make(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name in UNUSABLE:
            return Unusable(UNUSABLE[name])
        if name in _MAKERS:
            return _MAKERS[name](self, *arguments)
        if self._modules and name.startswith(MODULE_CLASSES) and not arguments:
            return Module(name)
        raise DamagedError(f"a call of {name}")

    def _build(self, _: None) -> None:
        state, value = self._stack.pop(), self._stack[-1]
        if type(value) is Module:
            value.attributes = state
        elif type(value) is NumpyType:
            value.order = _numpy_order(state)
        elif type(value) not in (dict, torch.Tensor, Unusable):  # attributes of these are skipped
            raise DamagedError("a state for something that has none")

    def _persistent(self, _: None) -> None:
        kind, dtype, key, _, count, *view = self._stack.pop()
        if kind != "storage" or type(dtype) is not Global or type(key) not in (str, int) or any(view):
            raise DamagedError("an unknown storage")
        if dtype.name not in STORAGES or not _is_size(count):
            raise DamagedError("an unknown storage")
        storage = self.storages[str(key)] = Storage(str(key), STORAGES[dtype.name], count)
        self._push(storage)

    def _tensor(self, storage, offset, size, stride, dtype=None) -> Any:
        if type(storage) is not Storage or (dtype is not None and type(dtype) is not Global):
            raise DamagedError("a tensor without a storage")
        sizes, strides = tuple(size), tuple(stride)
        if len(sizes) != len(strides) or len(sizes) > MOST_DIMENSIONS:
            raise DamagedError("a tensor with an invalid shape")
        if not all(map(_is_size, (offset, *sizes, *strides))) or math.prod(sizes) > LARGEST:
            raise DamagedError("a tensor with an invalid shape")
        if (DTYPES.get(dtype.name) if dtype else storage.dtype) not in DTYPES.values():
            return Unusable(f"a tensor of dtype {dtype.name if dtype else storage.dtype}")
        return self._make_tensor(storage, offset, sizes, strides, DTYPES[dtype.name] if dtype else None)

    def _typed_tensor(self, function: Any, kind: Any, arguments: Any, state: Any) -> Any:
        """Make a tensor without its attributes, or a parameter subclass."""
        if type(function) is not Global or type(arguments) is not tuple or function.name not in _REBUILDERS:
            raise DamagedError("a tensor of an unknown kind")
        return self._make(function.name, arguments)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _fill(holder: dict[Any, Any], pairs: Any) -> None:
    """Put pairs into a dict, without keys that can be crafted to collide (large numbers, tuples)."""
    for key, value in pairs:
        if type(key) in (str, bytes, bool) or (type(key) is int and abs(key) < 2**31):
            holder[key] = value


def _dict(_: Unpickler, content: Any = ()) -> dict[Any, Any]:
    holder: dict[Any, Any] = {}
    _fill(holder, content.items() if type(content) is dict else content)
    return holder


def _bytes(_: Unpickler, text: str = "", encoding: str = "latin1") -> bytes:
    # protocol 2 stores bytes as text
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise DamagedError("bytes in an unknown encoding")
    return text.encode("latin1")


def _numpy_type(_: Unpickler, code: Any, *rest: Any) -> NumpyType:
    if type(code) is not str:
        raise DamagedError("an unknown NumPy dtype")
    return NumpyType(code)


def _numpy_order(state: Any) -> str:
    """Return the byte order in the pickled state of a NumPy dtype; `|` is that of single bytes."""
    order = state[1] if type(state) is tuple and len(state) > 1 else None
    if order not in ("<", ">", "=", "|"):
        raise DamagedError("an unknown NumPy dtype")
    return order


def _numpy_scalar(_: Unpickler, dtype: Any, content: Any = b"") -> Any:
    if type(dtype) is not NumpyType:
        raise DamagedError("a NumPy value without a dtype")
    return dtype.read(content)


def _first(_: Unpickler, value: Any, *rest: Any) -> Any:
    return value


_REBUILDERS: dict[str, Callable[..., Any]] = {
    # storage, offset, size, stride; since v2 also requires_grad and hooks, since v3 the dtype
    "torch._utils._rebuild_tensor": lambda unpickler, *arguments: unpickler._tensor(*arguments[:4]),
    "torch._utils._rebuild_tensor_v2": lambda unpickler, *arguments: unpickler._tensor(*arguments[:4]),
    "torch._utils._rebuild_tensor_v3": lambda unpickler, *arguments: unpickler._tensor(*arguments[:4], arguments[6]),
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
}
_MAKERS: dict[str, Callable[..., Any]] = _REBUILDERS | {
    "torch._tensor._rebuild_from_type_v2": Unpickler._typed_tensor,
    "torch.nn.parameter.Parameter": _first,
    "torch.Size": lambda _, sizes=(): tuple(sizes),
    "torch.device": lambda _, *names: names,
    "torch.serialization._get_layout": _first,
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_doublelist": _first,
    "torch.jit._pickle.build_boollist": _first,
    "torch.jit._pickle.build_tensorlist": _first,
    "torch.jit._pickle.restore_type_tag": _first,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "builtins.set": lambda _, items=(): list(items),
    "builtins.complex": lambda _, real, imaginary: complex(real, imaginary),
    "builtins.bytearray": _bytes,
    "_codecs.encode": _bytes,
    "numpy.dtype": _numpy_type,
    **dict.fromkeys(NUMPY_SCALARS, _numpy_scalar),
}

_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "BINSTRING"}
_HANDLERS: dict[str, Callable[[Unpickler, Any], None]] = {
    **dict.fromkeys(("PROTO", "STOP"), lambda u, _: None),
    "NONE": lambda u, _: u._push(None),
    "NEWTRUE": lambda u, _: u._push(True),
    "NEWFALSE": lambda u, _: u._push(False),
    "EMPTY_TUPLE": lambda u, _: u._push(()),
    "EMPTY_LIST": lambda u, _: u._push([]),
    "EMPTY_DICT": lambda u, _: u._push({}),
    "MARK": Unpickler._mark,
    "TUPLE": lambda u, _: u._push(tuple(u._pop_mark())),
    "TUPLE1": lambda u, _: u._tuple(1),
    "TUPLE2": lambda u, _: u._tuple(2),
    "TUPLE3": lambda u, _: u._tuple(3),
    "APPEND": lambda u, _: u._append([u._stack.pop()]),
    "APPENDS": lambda u, _: u._append(u._pop_mark()),
    "SETITEM": lambda u, _: u._set_items([u._stack.pop(-2), u._stack.pop()]),
    "SETITEMS": lambda u, _: u._set_items(u._pop_mark()),
    "GLOBAL": Unpickler._global,
    "REDUCE": Unpickler._call,
    "NEWOBJ": Unpickler._call,
    "BUILD": Unpickler._build,
    "BINPERSID": Unpickler._persistent,
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda u, number: u._push(u._memo[number])),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda u, number: u._memo.__setitem__(number, u._stack[-1])),
}
