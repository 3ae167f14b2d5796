"""CIFAR-10, CIFAR-100 and STL-10 from their official archives.

CIFAR's batches are pickles. A file is used if it has the official MD5 sum, and no unpickler makes an object of it: the
arrays in a batch are taken as the bytes that they are.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, download_and_extract_archive, extract_archive

from clip_retrieval.classification.class_names import OFFICIAL_NAMES
from clip_retrieval.data.images.image_files import ImageArray
from clip_retrieval.errors import UserError
from clip_retrieval.files import open_regular
from clip_retrieval.log import log

READERS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}
"""torchvision's classes, which have the names and the MD5 sums of the files."""


def archive_root(name: str, root: Path) -> Path:
    """The folder of an archive, or of what was extracted from it: {root}/{name} if that holds it, else `root`.

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
        download: fetch the archive if it is missing.
        mend: what else than putting the archive there helps if it is missing.

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
    contents = _read_official(extracted, reader.test_list)
    if contents is None and download:
        _fetch(reader, root)
        contents = _read_official(extracted, reader.test_list)
    if contents is None:
        found = "is not the official one, or not whole" if extracted.is_dir() else "is missing"
        raise UserError(f"{extracted}: {found}; put {reader.filename} ({reader.url}) into {root}, or {mend}")
    pixels, labels = _read_stl(*contents) if name == "stl10" else _read_cifar(*contents)
    return ImageArray(pixels, name), labels, OFFICIAL_NAMES[name]


def _read_official(folder: Path, files: Sequence[tuple[str, str]]) -> list[bytes] | None:
    """The contents of files given by name and MD5 sum; None if one is missing or another one."""
    contents = []
    for file, md5 in files:
        try:
            with open_regular(folder / file) as opened:
                content = opened.read()
        except OSError:
            return None
        if not _has_sum(content, md5):
            return None
        contents.append(content)
    return contents


def _has_sum(content: bytes, md5: str) -> bool:
    return hashlib.md5(content, usedforsecurity=False).hexdigest() == md5


def _fetch(reader: Any, root: Path) -> None:
    """Fetch an archive into `root` and extract it. Raises UserError if it cannot be fetched."""
    archive = root / reader.filename
    if archive.is_symlink():
        raise UserError(f"{archive}: a link, which a download would write through; take it away")
    try:
        download_and_extract_archive(reader.url, str(root), filename=reader.filename, md5=reader.tgz_md5)
    except (RuntimeError, OSError) as error:  # RuntimeError: of a download that broke
        raise UserError(f"{reader.url} could not be fetched into {root} ({error}); is there a network?") from None


def _read_stl(images: bytes, labels: bytes) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (images, 96, 96, 3) and int64 (images,) of STL-10: columns of pixels, and labels from 1 on."""
    pixels = np.frombuffer(images, np.uint8).reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    return pixels, np.frombuffer(labels, np.uint8).astype(np.int64) - 1


def _read_cifar(batch: bytes) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (images, 32, 32, 3) and int64 (images,) of a batch of CIFAR-10 or CIFAR-100."""
    content = _Unpickler(io.BytesIO(batch), encoding="latin1").load()
    labels = content["labels"] if "labels" in content else content["fine_labels"]
    return content["data"].pixels().reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels, np.int64)


_OF_ARRAYS = {
    *(("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")),
    *(("numpy", "ndarray"), ("numpy", "dtype")),
}


class _Unpickler(pickle.Unpickler):
    """Makes plain values, and an `_Array` of what would become a numpy array; refuses all else."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) in _OF_ARRAYS:
            return _Array
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class _Array:
    """What a pickle tells of an array: version, shape, type, order, bytes."""

    def __init__(self, *arguments: Any):
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def pixels(self) -> np.ndarray:
        """uint8 (n,)."""
        content = self.state[-1]  # a text in pickles of Python 2
        return np.frombuffer(content.encode("latin1") if isinstance(content, str) else content, np.uint8)
