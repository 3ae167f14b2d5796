"""CIFAR-10, CIFAR-100 and STL-10 from their official archives, through torchvision.

CIFAR's batches are pickles. Only files that carry the official MD5 sums are ever unpickled: torchvision checks, before
it opens any, all batches (in the constructor) and the meta file (in `_load_meta`), and here the archive is checked
before it is extracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, extract_archive

from clip_retrieval.classification.official_names import OFFICIAL_NAMES
from clip_retrieval.data.images import ImageArray
from clip_retrieval.errors import UserError
from clip_retrieval.reporting.log import log

READERS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}
TEST = {"cifar10": {"train": False}, "cifar100": {"train": False}, "stl10": {"split": "test"}}


def archive_root(name: str, root: Path) -> Path:
    """The folder of an archive, or of what was extracted from it: {root}/{name} where it is there, else `root`.

    `root` may also be what was extracted itself.
    """
    reader = READERS[name]
    if root.is_dir() and root.resolve().name == reader.base_folder:
        return root.resolve().parent
    below = root / name
    return below if any((below / held).exists() for held in (reader.filename, reader.base_folder)) else root


def read_archive(
    name: str, root: Path, *, download: bool = False, mend: str = "fetch it with --download"
) -> tuple[ImageArray, np.ndarray, Sequence[str]]:
    """The test images, their labels int64 (images,), and the official names of the classes.

    Args:
        name: one of READERS.
        root: the folder that holds the archive (it is extracted there) or what was extracted from it.
        download: fetch the archive where it is missing.
        mend: what else than putting the archive there helps where it is missing.

    Raises:
        UserError: the files are missing, or are not the official ones; or the download failed.
    """
    reader = READERS[name]
    archive, extracted = root / reader.filename, root / reader.base_folder
    if not extracted.is_dir() and archive.is_file():
        if not check_integrity(str(archive), reader.tgz_md5):
            raise UserError(f"{archive}: not the official archive (its MD5 sum differs); fetch it again, {reader.url}")
        log.info(f"extracting {archive}")
        extract_archive(str(archive), str(root))
    try:
        data = reader(str(root), download=download, **TEST[name])
    except RuntimeError:  # torchvision's word for missing or changed files, and for a download that broke
        found = "is not the official one, or not whole" if extracted.is_dir() else "is missing"
        raise UserError(f"{extracted}: {found}; put {reader.filename} ({reader.url}) into {root}, or {mend}") from None
    except OSError as error:
        if not download:
            raise
        raise UserError(f"{reader.url} could not be fetched into {root} ({error}); is there a network?") from None
    labels = data.labels if name == "stl10" else data.targets
    pixels = data.data.transpose(0, 2, 3, 1) if name == "stl10" else data.data
    return ImageArray(pixels, name), np.asarray(labels, np.int64), OFFICIAL_NAMES[name]
