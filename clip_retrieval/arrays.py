"""Safe reading of .npy and .npz files: each header is checked against the file size before memory is allocated.

Pickles are never loaded: object arrays and pickles are refused. So are compressed .npz files.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Literal

import numpy as np

from clip_retrieval.errors import UserError, describe
from clip_retrieval.files import explain_errors, open_regular
from clip_retrieval.memory import memory_limit

KINDS = "biuf"  # dtype kinds: bool, integers, floats
NAMES = {"U": "texts", "i": "signed integers"}
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npy(path: Path, *, memory_map: bool = False) -> np.ndarray:
    """Read an array of numbers from a .npy file, in native byte order; with memory_map it stays on disk.

    Raises UserError, naming the file, if it cannot be read, is damaged, truncated or something else, or exceeds memory.
    """
    try:
        with explain_errors(path), open_regular(path) as file:
            shape, fortran, dtype = _read_header(file)
            count, begin = math.prod(shape), file.tell()
            size, available = count * dtype.itemsize, os.fstat(file.fileno()).st_size - begin
            if size > available:
                raise ValueError(f"its header promises {size:,} bytes, but {max(available, 0):,} follow")
            if count == 0:
                return np.empty(shape, dtype)
            order: Literal["C", "F"] = "F" if fortran else "C"
            if memory_map and dtype.isnative:
                return np.memmap(file, dtype, "r", begin, shape, order)
            if size > memory_limit():
                raise ValueError(f"{size:,} bytes are more than the memory of this machine")
            array = np.fromfile(file, dtype, count).reshape(shape, order=order)
            return array if dtype.isnative else array.astype(dtype.newbyteorder("="))
    except (ValueError, MemoryError) as error:
        raise UserError(f"{path}: not a readable .npy array ({describe(error)}); write it with numpy.save") from None


def read_npz(path: Path, kinds: dict[str, str], optional: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Read arrays (n,) from a .npz file written by numpy.savez.

    kinds: the dtype kinds that each array may have, such as {"ids": "U", "ranks": "i"}; other arrays are not read.
    optional: the arrays that may be missing.

    Raises UserError, naming the file, if it cannot be read, lacks an array, is damaged or is something else.
    """
    arrays = {}
    name = ""
    try:
        with explain_errors(path), open_regular(path) as file, zipfile.ZipFile(file) as members:
            present = set(members.namelist())
            for name, kind in kinds.items():
                if name in optional and f"{name}.npy" not in present:
                    continue
                info = members.getinfo(f"{name}.npy")
                size = os.fstat(file.fileno()).st_size
                if info.compress_type != zipfile.ZIP_STORED or not 0 <= info.file_size <= size:
                    raise ValueError("it is compressed")
                with members.open(info) as member:
                    shape, _, dtype = _read_header(member, kind)
                    if len(shape) != 1 or dtype.itemsize == 0 or shape[0] > size // dtype.itemsize:
                        raise ValueError(f"its header has the shape {shape}")
                    content = member.read(shape[0] * dtype.itemsize)
                    # an invalid character would be a SystemError where the text is used
                    if kind == "U" and np.frombuffer(content, f"{dtype.str[0]}u4").max(initial=0) > sys.maxunicode:
                        raise ValueError("it holds invalid characters")
                    arrays[name] = np.frombuffer(content, dtype, shape[0])
    except (ValueError, KeyError, RuntimeError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        part = f"array {name}: " if name else ""
        raise UserError(f"{path}: not a readable .npz file ({part}{describe(error)}); write it again") from None
    return arrays


def _read_header(file: IO[bytes], kinds: str = KINDS) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, whether it is in Fortran order, and dtype. Raises ValueError unless it is an array of the kinds."""
    try:
        version = np.lib.format.read_magic(file)
    except ValueError:
        raise ValueError("no .npy header") from None
    if version not in HEADERS:
        raise ValueError(f"unknown version {'.'.join(map(str, version))}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of Python 2 files, Python of damaged literals
            shape, fortran, dtype = HEADERS[version](file)
    # numpy parses the header as a Python literal: damage can raise nearly anything (SyntaxError, TokenError, ...).
    except Exception:
        raise ValueError("its header is damaged") from None
    if dtype.kind not in kinds or (dtype.kind in KINDS and dtype.itemsize > 8):
        raise ValueError(f"it holds {dtype.name}, not {NAMES.get(kinds, 'numbers')}")
    if any(length < 0 for length in shape):
        raise ValueError(f"its header has the shape {shape}")
    return shape, fortran, dtype
