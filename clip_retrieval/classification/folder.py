"""Labelled images from a folder that has a folder for each class, as torchvision's ImageFolder reads it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from clip_retrieval.classification.labelled import LabelledImages
from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.errors import UserError
from clip_retrieval.log import log

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".jp2", ".bmp", ".gif", ".tif", ".tiff"}
IMAGE_SUFFIXES |= {".ppm", ".pgm", ".pbm", ".pnm"}
SHOWN = 5  # names of files that are skipped


def read_image_folder(
    folder: Path, name: str, names_of: Callable[[Sequence[str]], dict[str, str]], *, all_classes: bool = False
) -> LabelledImages:
    """The images of a folder; each folder in it is a class, with all images in it and below.

    Args:
        folder: the folder.
        name: what the data set is called.
        names_of: gives the folders, in their order, names; it may name others as well.
        all_classes: those others are classes too, only without images.

    Raises:
        UserError: there is no such folder, it or a folder of a class holds no image, or a folder has no name.
    """
    folders = class_folders(folder)
    names = names_of(folders)
    for missing in (each for each in folders if each not in names):
        raise UserError(f'{folder / missing}: the class file has no name for the folder "{missing}"; add it')
    classes = sort_naturally(names) if all_classes else folders
    if all_classes:
        log.info(f"{folder}: {len(classes) - len(folders):,} classes without a folder are candidates as well")
    paths: list[str] = []
    labels: list[int] = []
    skipped: list[Path] = []
    for label, of_class in enumerate(classes):
        if of_class not in folders:
            continue
        images, others = image_paths(folder / of_class)
        if not images:
            raise UserError(f"{folder / of_class}: holds no images; fill the folder, or take it away")
        paths += map(str, images)
        labels += [label] * len(images)
        skipped += others
    log_skipped(folder, skipped)
    return LabelledImages(name, ImageFiles(paths), np.array(labels), [names[of_class] for of_class in classes], folder)


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in `folder`, in their order. Raises UserError where there are none."""
    try:
        found = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not _hidden(entry.name)]
    except FileNotFoundError:
        raise UserError(f"{folder}: no such folder; give the folder that has a folder for each class") from None
    except NotADirectoryError:
        raise UserError(f"{folder}: a file; give the folder that has a folder for each class") from None
    if not found:
        raise UserError(f"{folder}: holds no folders; it must have a folder of images for each class")
    return sort_naturally(found)


def sort_naturally(names: Iterable[str]) -> list[str]:
    """Sorted; by their value where all are whole numbers, as ImageNetV2's folders are."""
    names = sorted(names)
    return sorted(names, key=int) if all(name.isascii() and name.isdigit() for name in names) else names


def image_paths(folder: Path, *, below: bool = True) -> tuple[list[Path], list[Path]]:
    """The image files in `folder`, and `below`, told by their names, and the other files; both sorted."""
    images, others = [], []
    seen: set[str] = set()
    for place, subfolders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        subfolders[:] = sorted(name for name in subfolders if below and real not in seen and not _hidden(name))
        if real in seen:  # links may lead anywhere
            continue
        seen.add(real)
        for name in sorted(name for name in files if not _hidden(name)):
            path = Path(place, name)
            (images if path.suffix.lower() in IMAGE_SUFFIXES else others).append(path)
    return images, others


def log_skipped(folder: Path, others: Sequence[Path]) -> None:
    """Say which files are no images."""
    if others:
        shown = ", ".join(str(path) for path in others[:SHOWN])
        more = f" and {len(others) - SHOWN:,} more" if len(others) > SHOWN else ""
        log.info(f"{folder}: skipped, as their names are not those of images: {shown}{more}")


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
