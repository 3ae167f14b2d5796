"""Labelled images from a folder with one subfolder per class, as in torchvision's ImageFolder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clip_retrieval.data.dataset import SPLITS, Images
from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.errors import UserError, format_count
from clip_retrieval.files import is_clutter
from clip_retrieval.log import log

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".jp2", ".bmp", ".gif", ".tif", ".tiff"}
IMAGE_SUFFIXES |= {".ppm", ".pgm", ".pbm", ".pnm"}
MAX_SHOWN = 5  # skipped files named in the log


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes.

    Attributes:
        name: name of the data set or of the folder, e.g. "cifar100".
        images: the images, opened on access.
        labels: int64 (images,), the class of each image.
        class_names: (classes,). Classes with the same name stay separate.
        place: folder of the images, if any.
        names_file: file of the class names, if any.
    """

    name: str
    images: Images
    labels: np.ndarray
    class_names: Sequence[str]
    place: Path | None = None
    names_file: Path | None = None


def read_image_folder(
    folder: Path, name: str, name_folders: Callable[[Sequence[str]], dict[str, str]], *, all_classes: bool = False
) -> LabelledImages:
    """List the images of a folder. Each subfolder is a class; its images are searched recursively.

    Args:
        folder: the folder.
        name: name of the data set.
        name_folders: returns a name for each subfolder; may name further classes.
        all_classes: count those further classes as candidates, without images.

    Raises UserError if the folder is missing, holds no subfolders, or a subfolder has no images or no name.
    """
    folders = list_class_folders(folder)
    names = name_folders(folders)
    for missing in (each for each in folders if each not in names):
        raise UserError(f'{folder / missing}: the class file has no name for the folder "{missing}"; add it')
    classes = sort_naturally(names) if all_classes else folders
    if all_classes:
        log.info(f"{folder}: further candidates: {format_count(len(classes) - len(folders), 'class')} without a folder")
    paths: list[str] = []
    labels: list[int] = []
    skipped: list[Path] = []
    for label, subfolder in enumerate(classes):
        if subfolder not in folders:
            continue
        images, others = list_images(folder / subfolder)
        if not images:
            raise UserError(f"{folder / subfolder}: holds no images; fill the folder, or delete it")
        paths += map(str, images)
        labels += [label] * len(images)
        skipped += others
    log_skipped(folder, skipped)
    return LabelledImages(name, ImageFiles(paths), np.array(labels), [names[each] for each in classes], folder)


def list_class_folders(folder: Path) -> list[str]:
    """The sorted names of the subfolders. Raises UserError if there are none."""
    try:
        subfolders = _list_subfolders(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        problem = "no such folder" if isinstance(error, FileNotFoundError) else "a file"
        raise UserError(f"{folder}: {problem}; give a folder with one folder of images per class") from None
    if not subfolders:
        raise UserError(f"{folder}: holds no folders; give a folder with one folder of images per class")
    return sort_naturally(subfolders)


def _list_subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_clutter(entry.name))


def choose_split_folder(folder: Path) -> Path:
    """Return the split to score of a folder that holds splits of class folders: test, else val, else train.

    A folder with other subfolders, or whose train/ and val/ hold images only, holds the classes itself.
    """
    names = _list_subfolders(folder) if folder.is_dir() else []
    if all(name.lower() in SPLITS for name in names):
        for split in ("test", "val", "train"):
            for name in names:
                if SPLITS[name.lower()] == split and _list_subfolders(folder / name):
                    log.info(f"{folder}: holds the splits {', '.join(names)}; {name} is scored")
                    return folder / name
    return folder


def sort_naturally(names: Iterable[str]) -> list[str]:
    """Sort names: by value if all are whole numbers (as ImageNetV2's folders), else as text."""
    names = sorted(names)
    return sorted(names, key=int) if all(name.isascii() and name.isdigit() for name in names) else names


def list_images(
    folder: Path, *, recursive: bool = True, on_error: Callable[[OSError], object] | None = None
) -> tuple[list[Path], list[Path]]:
    """The image files of `folder`, recognised by suffix, and its other files; both sorted.

    on_error: receives the error of each folder that cannot be listed; by default it is skipped.
    """
    images: list[Path] = []
    others: list[Path] = []
    seen: set[str] = set()
    for place, subfolders, files in os.walk(folder, onerror=on_error, followlinks=True):
        real = os.path.realpath(place)
        subfolders[:] = sorted(name for name in subfolders if recursive and real not in seen and not is_clutter(name))
        if real in seen:  # links can form a cycle
            continue
        seen.add(real)
        for name in sorted(name for name in files if not is_clutter(name)):
            path = Path(place, name)
            (images if path.suffix.lower() in IMAGE_SUFFIXES else others).append(path)
    return images, others


def log_skipped(folder: Path, others: Sequence[Path]) -> None:
    """Log the files that are not images."""
    if others:
        shown = ", ".join(str(path) for path in others[:MAX_SHOWN])
        more = f" and {len(others) - MAX_SHOWN:,} more" if len(others) > MAX_SHOWN else ""
        log.info(f"{folder}: skipped files without an image suffix: {shown}{more}")
