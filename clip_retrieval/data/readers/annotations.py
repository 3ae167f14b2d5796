"""Id lists of the splits, and how readers find a captions file in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from clip_retrieval.arrays import read_npy
from clip_retrieval.errors import UserError
from clip_retrieval.files import check_root

# The split id lists that come with the project.
ANNOTATIONS = Path(__file__).resolve().parents[3] / "datasets" / "annotations"


def read_ids(path: Path) -> np.ndarray:
    """The ids in a .npy file as int64 (ids,). Raises UserError, naming the file, if it holds something else."""
    ids = read_npy(path)
    if ids.dtype.kind not in "iu" or ids.ndim != 1 or (len(ids) and ids.max() > np.iinfo(np.int64).max):
        raise UserError(f"{path}: not a .npy file of whole numbers in one row; write it with numpy.save")
    return ids.astype(np.int64)


def first_file(candidates: Iterable[Path]) -> Path | None:
    """The first of the candidates that is a file."""
    return next((path for path in candidates if path.is_file()), None)


def only_file(root: Path, patterns: Sequence[str]) -> Path:
    """The one file in `root` that matches a pattern; UserError where there are none or several."""
    check_root(root)
    # Archives made on macOS bring a ._file along with every file.
    found = sorted(path for pattern in patterns for path in root.glob(pattern) if not path.name.startswith("."))
    if not found:
        raise UserError(f"{root}: holds no {' or '.join(patterns)}; name the captions file with --annotations")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{root}: holds several captions files ({names}); name one with --annotations")
    return found[0]
