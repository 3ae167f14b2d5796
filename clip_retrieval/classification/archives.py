"""CIFAR-10, CIFAR-100 and STL-10 from their official archives.

CIFAR's batches are pickles. Only files with the official MD5 sum are read. The unpickler creates no objects: it keeps
arrays as raw bytes.
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
"""torchvision's classes: they hold the file names and MD5 sums."""


def archive_root(name: str, root: Path) -> Path:
    """The folder that holds an archive or its extracted folder: {root}/{name} if it holds one, else `root`.

    `root` may also be the extracted folder itself.
    """
    reader = READERS[name]
    if root.is_dir() and root.resolve().name == reader.base_folder:
        return root.resolve().parent
    subfolder = root / name
    return subfolder if any((subfolder / file).exists() for file in (reader.filename, reader.base_folder)) else root


def read_archive(
    name: str, root: Path, *, download: bool = False, remedy: str = "fetch it with --download"
) -> tuple[ImageArray, np.ndarray, Sequence[str]]:
    """Read the test images, their labels int64 (images,), and the official class names.

    Args:
        name: one of READERS.
        root: folder that holds the archive (which is extracted there) or the extracted folder.
        download: fetch the archive if it is missing.
        remedy: advice for the message about missing files, besides copying the archive into `root`.

    Raises UserError if the files are missing or not the official ones, or if the download fails.
    """
    reader = READERS[name]
    archive, extracted = root / reader.filename, root / reader.base_folder
    # extract or fetch the archive
    if not extracted.is_dir() and archive.is_file():
        if not check_integrity(str(archive), reader.tgz_md5):
            raise UserError(f"{archive}: not the official archive (MD5 sum differs); fetch it again from {reader.url}")
        log.info(f"extracting {archive}")
        extract_archive(str(archive), str(root))
    contents = _read_official(extracted, reader.test_list)
    if contents is None and download:
        _fetch(reader, root)
        contents = _read_official(extracted, reader.test_list)
    if contents is None:
        problem = "is incomplete or not the official one" if extracted.is_dir() else "is missing"
        raise UserError(f"{extracted}: {problem}; put {reader.filename} ({reader.url}) into {root}, or {remedy}")
    # decode the test split
    pixels, labels = _read_stl(*contents) if name == "stl10" else _read_cifar(*contents)
    return ImageArray(pixels, name), labels, OFFICIAL_NAMES[name]


def _read_official(folder: Path, files: Sequence[tuple[str, str]]) -> list[bytes] | None:
    """The contents of files given as (name, MD5 sum); None if one is missing or has another sum."""
    contents = []
    for file, md5 in files:
        try:
            with open_regular(folder / file) as stream:
                content = stream.read()
        except OSError:
            return None
        if not _has_md5(content, md5):
            return None
        contents.append(content)
    return contents


def _has_md5(content: bytes, md5: str) -> bool:
    return hashlib.md5(content, usedforsecurity=False).hexdigest() == md5


def _fetch(reader: Any, root: Path) -> None:
    """Download an archive into `root` and extract it. Raises UserError if the download fails."""
    archive = root / reader.filename
    if archive.is_symlink():
        raise UserError(f"{archive}: a link, which a download would write through; delete it")
    try:
        download_and_extract_archive(reader.url, str(root), filename=reader.filename, md5=reader.tgz_md5)
    except (RuntimeError, OSError) as error:  # RuntimeError: the MD5 sum of the download differs
        raise UserError(
            f"{reader.url}: could not be fetched into {root} ({error}); check the network connection"
        ) from None


def _read_stl(images: bytes, labels: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Decode STL-10 (column-major pixels, labels from 1): uint8 (images, 96, 96, 3) and int64 (images,)."""
    pixels = np.frombuffer(images, np.uint8).reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    return pixels, np.frombuffer(labels, np.uint8).astype(np.int64) - 1


def _read_cifar(batch: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Decode a batch of CIFAR-10 or CIFAR-100: uint8 (images, 32, 32, 3) and int64 (images,)."""
    content = _Unpickler(io.BytesIO(batch), encoding="latin1").load()
    labels = content["labels"] if "labels" in content else content["fine_labels"]
    return content["data"].pixels().reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels, np.int64)


_ARRAY_GLOBALS = {
    *(("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")),
    *(("numpy", "ndarray"), ("numpy", "dtype")),
}


class _Unpickler(pickle.Unpickler):
    """Create plain values, and an `_Array` in place of each numpy array; refuse everything else."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) in _ARRAY_GLOBALS:
            return _Array
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class _Array:
    """The pickled state of a numpy array: version, shape, dtype, order, bytes."""

    def __init__(self, *arguments: Any):
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def pixels(self) -> np.ndarray:
        """uint8 (n,)."""
        content = self.state[-1]  # str in pickles of Python 2
        return np.frombuffer(content.encode("latin1") if isinstance(content, str) else content, np.uint8)
