"""Id lists of the splits, and the search for a captions file in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from clip_retrieval.arrays import read_npy
from clip_retrieval.errors import UserError
from clip_retrieval.files import check_root, is_clutter

_INSTALLED = Path(__file__).resolve().parents[1] / "annotations"
# The split id lists that come with the project: in the package if that is installed, else in the checkout.
ANNOTATIONS = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[2] / "datasets" / "annotations"


def read_ids(path: Path) -> np.ndarray:
    """Read the ids in a .npy file, int64 (ids,). Raises UserError, naming the file, if it holds anything else."""
    ids = read_npy(path)
    if ids.dtype.kind not in "iu" or ids.ndim != 1 or (len(ids) and ids.max() > np.iinfo(np.int64).max):
        raise UserError(f"{path}: not a .npy file of whole numbers in one row; write it with numpy.save")
    return ids.astype(np.int64)


def find_file(candidates: Iterable[Path]) -> Path | None:
    """Return the first of the candidates that is a file."""
    return next((path for path in candidates if path.is_file()), None)


def find_only_file(root: Path, patterns: Sequence[str]) -> Path:
    """Return the one file in `root` that matches a pattern. Raises UserError if there is none, or several."""
    check_root(root)
    found = sorted(path for pattern in patterns for path in root.glob(pattern) if not is_clutter(path.name))
    if not found:
        raise UserError(
            f"{root}: holds no {' or '.join(patterns)}; give the folder of the data set as --dataset_root, or name the "
            "captions file with --annotations"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{root}: holds several captions files ({names}); name one with --annotations")
    return found[0]
