"""Files of tensors: `torch.save`'s, old and new, `torch.jit.save`'s, and safetensors.

A file is opened once, and its bytes are mapped into memory: tensors are views of it, read from the disk when they are
used. Nothing in a file is run, no tensor needs more memory than the file has bytes, and the one parser that finds the
parts of an archive is Python's zipfile.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from clip_retrieval.errors import UserError, describe
from clip_retrieval.files import open_regular
from clip_retrieval.models.pickled import DamagedError, Module, PythonObjectError, Storage, Unusable
from clip_retrieval.models.unpickle import MODULE_CLASSES, Unpickler

ZIP = b"PK\x03\x04"
PICKLE = b"\x80"
TAR = (257, b"ustar")

MOST_TEXT = 2**28
"""Bytes of an archive's pickle and code together, uncompressed."""

MOST_MODULES, DEEPEST_MODULE = 100_000, 100

SHARED_VIEWS = 4
"""How many times the size of a file all its tensors may take together: tied weights are views of the same numbers."""

REMEDY = "save its state dict alone"
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True)
class TensorFile:
    """The content of a file of tensors.

    Attributes:
        content: None, bool, int, float, str, bytes, torch.Tensor (on the CPU, strided), `Unusable` for tensors of other
            kinds, and dicts, lists and tuples of these.
        is_torchscript: whether it is an archive of `torch.jit.save`; `content` then is its state dict.
    """

    content: Any
    is_torchscript: bool = False


def read_tensor_file(path: Path) -> TensorFile:
    """Read a file of tensors, whatever its name.

    Raises UserError, naming `path`, if it is missing, no regular file, damaged, of another format, or holds Python
    objects.
    """
    with _errors_named(path), _open(path) as file:
        start = file.read(512)
        if not start:
            raise UserError(f"{path} is empty; fetch it again")
        if path.suffix == ".safetensors" or start[8:9] == b"{":
            return TensorFile(_read_safetensors(path))
        # Private pages: what is written to a tensor stays in memory.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if start.startswith(ZIP):
            return _Archive(file, mapped).read()
        if start.startswith(PICKLE):
            return TensorFile(_read_legacy(mapped))
        if start[TAR[0] :].startswith(TAR[1]):
            raise DamagedError("a .tar of torch before 2017", "save it again with torch.save")
        raise DamagedError("no checkpoint")


def _open(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give the weight file in it") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such weight file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read as weights: {describe(error)}") from None


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """A block that reads a hostile file: whatever goes wrong is a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except PythonObjectError as error:
        raise UserError(
            f"{path} holds Python objects beside weights ({error}) and is refused: loading them can run any code; if "
            "you trust it, save its weights: torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)"
        ) from error
    except DamagedError as error:
        raise UserError(f"{path} cannot be read as weights: {error}") from error
    except (OSError, MemoryError) as error:
        raise UserError(f"{path} cannot be read: {describe(error)}") from error
    except Exception as error:  # zipfile, safetensors and torch raise nearly anything on broken input
        damage = DamagedError(f"damaged or cut short ({describe(error)})")
        raise UserError(f"{path} cannot be read as weights: {damage}") from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


class _Tensors:
    """The tensors of a mapped file.

    Args:
        mapped: all of the file.
        places: of each storage, by its key, its first byte and its length in bytes.
        swapped: whether the bytes of a number are in the other order.
    """

    def __init__(self, mapped: mmap.mmap, places: dict[str, tuple[int, int]], *, swapped: bool = False):
        self._mapped = mapped
        self._places = places
        self._swapped = swapped
        self._flat: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._made: dict[tuple[Any, ...], torch.Tensor] = {}
        self._budget = SHARED_VIEWS * len(mapped)

    def __call__(
        self, storage: Storage, offset: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype | None
    ) -> torch.Tensor:
        flat = self._numbers(storage, dtype or storage.dtype)
        count = math.prod(size)
        if not count:
            return torch.empty(size, dtype=flat.dtype)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride))
        if last >= len(flat) or count > len(flat):
            raise DamagedError(f"it has a tensor of {count:,} numbers, of which it holds {len(flat):,}")
        view = (storage.key, flat.dtype, offset, size, stride)
        if view not in self._made:
            self._budget -= count * flat.element_size()
            if self._budget < 0:
                raise DamagedError(f"its tensors need more than {SHARED_VIEWS} times the bytes that it holds")
            self._made[view] = flat.as_strided(size, stride, offset)
        return self._made[view]

    def _numbers(self, storage: Storage, dtype: torch.dtype) -> torch.Tensor:
        """All numbers of a storage, one-dimensional."""
        if (storage.key, dtype) in self._flat:
            return self._flat[storage.key, dtype]
        begin, length = self._places[storage.key]
        count = storage.count * storage.dtype.itemsize // dtype.itemsize
        used = count * dtype.itemsize
        if used > length:
            raise DamagedError("a tensor is longer than its part of the file")
        if not count:
            flat = torch.empty(0, dtype=dtype)
        elif self._swapped or begin % dtype.itemsize:
            flat = torch.frombuffer(bytearray(self._mapped[begin : begin + used]), dtype=dtype)
        else:
            flat = torch.frombuffer(self._mapped, dtype=dtype, count=count, offset=begin)
        if self._swapped:
            flat.untyped_storage().byteswap(dtype)
        self._flat[storage.key, dtype] = flat
        return flat


class _Archive:
    """A zip file of torch: `NAME/data.pkl`, `NAME/data/0` and so on."""

    def __init__(self, file: BinaryIO, mapped: mmap.mmap):
        self._zip = zipfile.ZipFile(file)
        self._mapped = mapped
        self._text_left = MOST_TEXT
        infos = self._zip.infolist()
        if len({info.filename.lower() for info in infos}) < len(infos):
            raise DamagedError("its archive has two entries of the same name")
        root = infos[0].filename.partition("/")[0] + "/" if infos else ""
        self._entries = {info.filename.removeprefix(root): info for info in infos if info.filename.startswith(root)}

    def read(self) -> TensorFile:
        if "data.pkl" not in self._entries:
            raise DamagedError("no checkpoint")
        is_torchscript = "constants.pkl" in self._entries
        order = self._bytes("byteorder") if "byteorder" in self._entries else b"little"
        if order not in (b"little", b"big"):
            raise DamagedError("an unknown byte order")
        places = {name.removeprefix("data/"): self._place(name) for name in self._entries if name.startswith("data/")}
        tensors = _Tensors(self._mapped, places, swapped=order.decode() != sys.byteorder)
        content = Unpickler(self._bytes("data.pkl"), tensors, modules=is_torchscript).load()
        return TensorFile(_state_dict(content, self._declared()) if is_torchscript else content, is_torchscript)

    def _bytes(self, name: str) -> bytes:
        """An entry that is no tensor."""
        info = self._entries[name]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DamagedError(f"{name} is compressed in a way that torch does not know")
        with self._zip.open(info) as entry:
            content = entry.read(self._text_left + 1)
        self._text_left -= len(content)
        if self._text_left < 0:
            raise DamagedError(f"its pickle and code are longer than {MOST_TEXT:,} bytes")
        return content

    def _place(self, name: str) -> tuple[int, int]:
        """First byte and length of an entry in the file."""
        info = self._entries[name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise DamagedError("its tensors are compressed or encrypted", "save it again with torch.save")
        header = self._mapped[info.header_offset : info.header_offset + _LOCAL_HEADER.size]
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        begin = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if signature != ZIP or begin + info.file_size > len(self._mapped):
            raise DamagedError(f"{name} is longer than the file")
        return begin, info.file_size

    def _declared(self) -> dict[str, set[str]]:
        """The names of the parameters and buffers of each class of a TorchScript archive, from its code."""
        declared = {}
        for name in self._entries:
            if name.startswith(f"code/{MODULE_CLASSES[:-1]}") and name.endswith(".py"):
                module = name.removeprefix("code/").removesuffix(".py").replace("/", ".")
                for found in _CLASS.finditer(self._bytes(name).decode("utf-8")):
                    declared[f"{module}.{found[1]}"] = set(_QUOTED.findall(found[2] + (found[3] or "")))
        return declared


_CLASS = re.compile(
    r"^class (\w+)\(Module\):\n  __parameters__ = (\[[^\n]*\])\n(?:  __buffers__ = (\[[^\n]*\])\n)?", re.MULTILINE
)
_QUOTED = re.compile(r'"([^"\\\n]+)"')


def _state_dict(root: Any, declared: dict[str, set[str]]) -> dict[str, Any]:
    """The parameters and buffers of a TorchScript module and of those in it, as torch names them."""
    if type(root) is not Module or root.name not in declared:
        raise DamagedError("its code declares no module")
    state: dict[str, Any] = {}
    left, visited = [(root, "", 0)], 0
    while left:
        module, prefix, depth = left.pop()
        if type(module.attributes) is not dict:
            raise DamagedError(f"{module.name} restores itself by code of its own, which is never run", REMEDY)
        visited += 1
        # A module may be in several others, and a crafted one in itself.
        if visited > MOST_MODULES or depth > DEEPEST_MODULE:
            raise DamagedError("its modules are nested without end")
        for name, value in module.attributes.items():
            if type(value) is Module and value.name in declared:
                left.append((value, f"{prefix}{name}.", depth + 1))
            elif name in declared[module.name] and isinstance(value, (torch.Tensor, Unusable)):
                state[f"{prefix}{name}"] = value
    return state


def _read_legacy(mapped: mmap.mmap) -> Any:
    """The object of `torch.save` before 2020: pickles one after another, then the storages."""
    scan = Unpickler(mapped, lambda *_: None)
    if (scan.load(), scan.load()) != (LEGACY_MAGIC, LEGACY_PROTOCOL):
        raise PythonObjectError("a pickle that torch did not write")
    scan.load()  # of the system that wrote it
    start = scan.position
    # First to learn where the storages are, which follow, then to make the tensors.
    scan.load()
    keys, places, position = scan.load(), {}, scan.position
    for key in map(str, keys):
        (count,) = struct.unpack("<q", mapped[position : position + 8])
        length = count * scan.storages[key].dtype.itemsize
        places[key] = (position + 8, length)
        position += 8 + length
        if count < 0 or position > len(mapped):
            raise DamagedError("cut short")
    unpickler = Unpickler(mapped, _Tensors(mapped, places))
    unpickler.position = start
    return unpickler.load()
