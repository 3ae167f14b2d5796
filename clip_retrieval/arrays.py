"""Safe reading of .npy files: the header is checked against the file size before memory is allocated.

Pickles are never loaded: object arrays, .npz files and pickles are refused.
"""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from clip_retrieval.errors import UserError, describe
from clip_retrieval.files import open_regular
from clip_retrieval.memory import memory_limit

KINDS = "biuf"  # dtype kinds: bool, integers, floats
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npy(path: Path, *, memory_map: bool = False) -> np.ndarray:
    """Read an array of numbers from a .npy file, in native byte order; with memory_map it stays on disk.

    Raises UserError, naming the file, if it cannot be read, is damaged, truncated or something else, or exceeds memory.
    """
    try:
        with open_regular(path) as file:
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
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({describe(error)}); check the path") from None
    except (ValueError, MemoryError) as error:
        raise UserError(f"{path}: not a readable .npy array ({describe(error)}); write it with numpy.save") from None


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, whether it is in Fortran order, and dtype. Raises ValueError unless it is an array of numbers."""
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
    if dtype.kind not in KINDS or dtype.itemsize > 8:
        raise ValueError(f"it holds {dtype.name}, not numbers")
    if any(length < 0 for length in shape):
        raise ValueError(f"its header has the shape {shape}")
    return shape, fortran, dtype
