"""Readers of tensor files: `torch.save`'s, old and new, `torch.jit.save`'s, and safetensors.

A file is opened once and mapped into memory. Tensors are views of the map, read from the disk when they are used.
Nothing in a file is run, no tensor needs more memory than the file has bytes, and the only parser of archives is
Python's zipfile.
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

import safetensors.torch
import torch

from clip_retrieval.errors import UserError, describe
from clip_retrieval.files import open_regular
from clip_retrieval.models.foreign import (
    NUMPY_ARCHIVE,
    find_folder_problem,
    find_shard_problem,
    find_start_problem,
)
from clip_retrieval.models.pickled import DamagedError, Module, PythonObjectError, Storage, Unusable
from clip_retrieval.models.unpickle import MODULE_CLASSES, Unpickler

ZIP = b"PK\x03\x04"
PICKLE = b"\x80"
TAR = (257, b"ustar")

MOST_TEXT = 2**28
"""Bytes of an archive's pickle and code together, uncompressed."""

MOST_MODULES, DEEPEST_MODULE = 100_000, 100

SHARED_VIEWS = 4
"""Limit of the bytes of all tensors, in sizes of the file: tied weights are views of the same numbers."""

FOLDER = "is a folder; give a weight file in it"
REMEDY = "save its state dict alone"
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True)
class TensorFile:
    """The content of a file of tensors.

    Attributes:
        content: None, bool, int, float, str, bytes, torch.Tensor (on the CPU, strided), `Unusable` for other tensors,
            and dicts, lists and tuples of these.
        is_torchscript: whether it is an archive of `torch.jit.save`; then `content` is its state dict.
    """

    content: Any
    is_torchscript: bool = False


def read_tensor_file(path: Path) -> TensorFile:
    """Read a file of tensors; its content decides the format, not its name.

    Raises UserError, naming `path`, if it is missing, not a regular file, damaged, of another format, or holds Python
    objects.
    """
    with _translate_errors(path), open_regular(path) as file:
        start = file.read(512)
        if not start:
            raise UserError(f"{path} is empty; fetch it again")
        if foreign := find_start_problem(start):
            raise DamagedError(*foreign)
        if path.suffix == ".safetensors" or start[8:9] == b"{":
            return TensorFile(safetensors.torch.load_file(path))
        # private pages: writes to a tensor stay in memory
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if start.startswith(ZIP):
            return _Archive(file, mapped).read()
        if start.startswith(PICKLE):
            return TensorFile(_read_legacy(mapped))
        if start[TAR[0] :].startswith(TAR[1]):
            raise DamagedError("a .tar of torch before 2017", "save it again with torch.save")
        raise DamagedError("not a checkpoint")


@contextmanager
def _translate_errors(path: Path) -> Iterator[None]:
    """Translate every error of reading a hostile file to a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except IsADirectoryError:
        raise UserError(f"{path} {find_folder_problem(path) or FOLDER}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such weight file") from None
    except PythonObjectError as error:
        if problem := find_shard_problem(path, {}):
            raise UserError(f"{path} {problem}") from error
        raise UserError(
            f"{path} holds Python objects ({error}) and is refused: loading them can run any code; if you trust it, "
            "load it with torch.load(FILE, weights_only=False) and save only its weights: torch.save(STATE_DICT, NEW)"
        ) from error
    except DamagedError as error:
        raise UserError(f"{path} cannot be read as weights: {error}") from error
    except (OSError, MemoryError) as error:
        raise UserError(f"{path} cannot be read: {describe(error)}") from error
    except Exception as error:  # zipfile, safetensors and torch raise nearly anything on broken input
        damage = DamagedError(f"damaged or truncated ({describe(error)})")
        raise UserError(f"{path} cannot be read as weights: {damage}") from error


class _TensorMaker:
    """Makes the tensors of a mapped file.

    Args:
        mapped: the whole file.
        places: first byte and length in bytes of each storage, by key.
        swap_bytes: whether the byte order differs from this machine's.
    """

    def __init__(self, mapped: mmap.mmap, places: dict[str, tuple[int, int]], *, swap_bytes: bool = False):
        self._mapped = mapped
        self._places = places
        self._swap_bytes = swap_bytes
        self._flat: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._views: dict[tuple[Any, ...], torch.Tensor] = {}
        self._budget = SHARED_VIEWS * len(mapped)

    def __call__(
        self, storage: Storage, offset: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype | None
    ) -> torch.Tensor:
        flat = self._read_storage(storage, dtype or storage.dtype)
        count = math.prod(size)
        if not count:
            return torch.empty(size, dtype=flat.dtype)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride))
        if last >= len(flat) or count > len(flat):
            raise DamagedError(f"it has a tensor of {count:,} numbers but holds only {len(flat):,} of them")
        view = (storage.key, flat.dtype, offset, size, stride)
        if view not in self._views:
            self._budget -= count * flat.element_size()
            if self._budget < 0:
                raise DamagedError(f"its tensors need more than {SHARED_VIEWS} times the bytes that it holds")
            self._views[view] = flat.as_strided(size, stride, offset)
        return self._views[view]

    def _read_storage(self, storage: Storage, dtype: torch.dtype) -> torch.Tensor:
        """Return all numbers of a storage as a one-dimensional tensor."""
        if (storage.key, dtype) in self._flat:
            return self._flat[storage.key, dtype]
        begin, length = self._places[storage.key]
        count = storage.count * storage.dtype.itemsize // dtype.itemsize
        used = count * dtype.itemsize
        if used > length:
            raise DamagedError("a tensor is longer than its entry in the file")
        if not count:
            flat = torch.empty(0, dtype=dtype)
        elif self._swap_bytes or begin % dtype.itemsize:
            flat = torch.frombuffer(bytearray(self._mapped[begin : begin + used]), dtype=dtype)
        else:
            flat = torch.frombuffer(self._mapped, dtype=dtype, count=count, offset=begin)
        if self._swap_bytes:
            flat.untyped_storage().byteswap(dtype)
        self._flat[storage.key, dtype] = flat
        return flat


class _Archive:
    """A zip file written by torch: `NAME/data.pkl`, `NAME/data/0` and so on."""

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
            if any(info.filename.endswith(".npy") for info in self._zip.infolist()):
                raise DamagedError(*NUMPY_ARCHIVE)
            raise DamagedError("not a checkpoint")
        is_torchscript = "constants.pkl" in self._entries
        order = self._read_entry("byteorder") if "byteorder" in self._entries else b"little"
        if order not in (b"little", b"big"):
            raise DamagedError("an unknown byte order")
        places = {name.removeprefix("data/"): self._locate(name) for name in self._entries if name.startswith("data/")}
        make_tensor = _TensorMaker(self._mapped, places, swap_bytes=order.decode() != sys.byteorder)
        content = Unpickler(self._read_entry("data.pkl"), make_tensor, modules=is_torchscript).load()
        if is_torchscript:
            content = _collect_state_dict(content, self._read_declarations())
        return TensorFile(content, is_torchscript)

    def _read_entry(self, name: str) -> bytes:
        """Read an entry that is not a tensor."""
        info = self._entries[name]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DamagedError(f"{name} is compressed by a method that torch does not use")
        with self._zip.open(info) as entry:
            content = entry.read(self._text_left + 1)
        self._text_left -= len(content)
        if self._text_left < 0:
            raise DamagedError(f"its pickle and code are longer than {MOST_TEXT:,} bytes")
        return content

    def _locate(self, name: str) -> tuple[int, int]:
        """Return the first byte and the length of an entry."""
        info = self._entries[name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise DamagedError("its tensors are compressed or encrypted", "save it again with torch.save")
        header = self._mapped[info.header_offset : info.header_offset + _LOCAL_HEADER.size]
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        begin = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if signature != ZIP or begin + info.file_size > len(self._mapped):
            raise DamagedError(f"{name} is longer than the file")
        return begin, info.file_size

    def _read_declarations(self) -> dict[str, set[str]]:
        """Read the names of each class's parameters and buffers from the code of a TorchScript archive."""
        declarations = {}
        for name in self._entries:
            if name.startswith(f"code/{MODULE_CLASSES[:-1]}") and name.endswith(".py"):
                module = name.removeprefix("code/").removesuffix(".py").replace("/", ".")
                for match in _CLASS.finditer(self._read_entry(name).decode("utf-8")):
                    declarations[f"{module}.{match[1]}"] = set(_QUOTED.findall(match[2] + (match[3] or "")))
        return declarations


_CLASS = re.compile(
    r"^class (\w+)\(Module\):\n  __parameters__ = (\[[^\n]*\])\n(?:  __buffers__ = (\[[^\n]*\])\n)?", re.MULTILINE
)
_QUOTED = re.compile(r'"([^"\\\n]+)"')


def _collect_state_dict(root: Any, declarations: dict[str, set[str]]) -> dict[str, Any]:
    """Collect the parameters and buffers of a TorchScript module and its submodules under torch's names."""
    if type(root) is not Module or root.name not in declarations:
        raise DamagedError("its code declares no module")
    state: dict[str, Any] = {}
    stack, visited = [(root, "", 0)], 0
    while stack:
        module, prefix, depth = stack.pop()
        if type(module.attributes) is not dict:
            raise DamagedError(f"{module.name} restores itself with its own code, which is never run", REMEDY)
        visited += 1
        # A module may be in several others, and a crafted module in itself.
        if visited > MOST_MODULES or depth > DEEPEST_MODULE:
            raise DamagedError("its modules are nested without end")
        for name, value in module.attributes.items():
            if type(value) is Module and value.name in declarations:
                stack.append((value, f"{prefix}{name}.", depth + 1))
            elif name in declarations[module.name] and isinstance(value, (torch.Tensor, Unusable)):
                state[f"{prefix}{name}"] = value
    return state


def _read_legacy(mapped: mmap.mmap) -> Any:
    """Read a file of `torch.save` before 2020: several pickles, then the storages."""
    start = mapped[:MOST_TEXT]  # the pickles come first
    scan = Unpickler(start, lambda *_: torch.empty(0))
    if (scan.load(), scan.load()) != (LEGACY_MAGIC, LEGACY_PROTOCOL):
        raise PythonObjectError("a pickle that torch did not write")
    scan.load()  # system information
    begin = scan.file.tell()
    # first pass: the storages, which follow the pickle
    scan.load()
    keys, places, position = scan.load(), {}, scan.file.tell()
    for key in map(str, keys):
        (count,) = struct.unpack("<q", mapped[position : position + 8])
        length = count * scan.storages[key].dtype.itemsize
        places[key] = (position + 8, length)
        position += 8 + length
        if count < 0 or position > len(mapped):
            raise DamagedError("truncated")
    # second pass: the tensors
    unpickler = Unpickler(start, _TensorMaker(mapped, places))
    unpickler.file.seek(begin)
    return unpickler.load()
