"""From the name of a data set, or a folder, to labelled images."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from clip_retrieval.classification.class_names import (
    OFFICIAL_NAMES,
    clean_name,
    imagenet_folder_names,
    imagenet_names,
    read_class_names,
)
from clip_retrieval.classification.folder import read_image_folder
from clip_retrieval.classification.labelled import LabelledImages
from clip_retrieval.classification.templates import OF_DATA, Templates, choose_templates
from clip_retrieval.errors import UserError
from clip_retrieval.files import path_exists
from clip_retrieval.log import log

IMAGENET = "imagenet"
IMAGENET_SIZES = (1000, 200)  # classes: of ImageNet, V2 and Sketch; of its variants A and R
WORDNET_ID = re.compile(r"n\d{8}")
NAMES = (*OFFICIAL_NAMES, IMAGENET)


@dataclass(frozen=True)
class OptionNames:
    """What the program that runs calls its options, for messages; None for what it has not."""

    data_root: str = "--data_root"
    class_names: str = "--class_names"
    templates: str = "--templates"
    download: str | None = "--download"


@dataclass(frozen=True)
class ZeroShotData:
    """What is to be classified, and in which words.

    Attributes:
        data: cifar10, cifar100, stl10, imagenet, or the path of a folder with a folder of images for each class.
        data_root: the folder of a data set that goes by name: the one that holds the archive or what was extracted
            from it, or ImageNet's folder of class folders (also that of a variant); or the folder that holds this
            one under the data set's name.
        class_names: file with the names of the classes (see `read_class_names`), instead of the data set's own.
        all_classes: the classes that this file, or ImageNet, knows without there being a folder count as classes.
        templates: a set of templates, or a file.
        template: templates themselves.
        download: fetch an archive that is missing.
        options: what messages call the options.
    """

    data: str
    data_root: Path = Path("datasets")
    class_names: Path | None = None
    all_classes: bool = False
    templates: str | None = None
    template: tuple[str, ...] = ()
    download: bool = False
    options: OptionNames = OptionNames()


def read_labelled(wanted: ZeroShotData) -> tuple[LabelledImages, Templates]:
    """The labelled images, and the templates that go with them.

    Raises UserError, naming the file or the folder, where one is missing or not as it should be.
    """
    if wanted.download and wanted.data not in OFFICIAL_NAMES:
        raise UserError(f"--download fetches {', '.join(OFFICIAL_NAMES)}; drop it, {wanted.data} has to be there")
    if wanted.all_classes and wanted.data != IMAGENET and wanted.class_names is None:
        raise UserError("--all_classes takes the classes from --class_names; give the file, or drop the option")
    if wanted.data in OFFICIAL_NAMES:
        labelled = _archive(wanted)
    elif wanted.data == IMAGENET or path_exists(wanted.data):
        labelled = _folder(wanted)
    else:
        without = "" if wanted.options.download else "; --zero_shot_eval none goes on without it"
        raise UserError(f"{wanted.data}: no such folder of images, and none of {', '.join(NAMES)}{without}")
    usual = OF_DATA.get(wanted.data, "imagenet")
    templates = choose_templates(
        wanted.templates, wanted.template, labelled.class_names, usual, option=wanted.options.templates
    )
    return replace(labelled, names_file=wanted.class_names), templates


def _archive(wanted: ZeroShotData) -> LabelledImages:
    from clip_retrieval.classification.archives import archive_root, read_archive

    if wanted.all_classes:
        raise UserError(f"--all_classes is for folders: {wanted.data} has images of all its classes; drop it")
    options = wanted.options
    mend = f"fetch it with {options.download}" if options.download else f"give its folder as {options.data_root}"
    root = archive_root(wanted.data, wanted.data_root)
    images, labels, classes = read_archive(wanted.data, root, download=wanted.download, mend=mend)
    names = read_class_names(wanted.class_names, classes) if wanted.class_names else {c: clean_name(c) for c in classes}
    if missing := [each for each in classes if each not in names]:
        raise UserError(f'{wanted.class_names}: has no name for the class "{missing[0]}" of {wanted.data}; add it')
    return LabelledImages(wanted.data, images, labels, [names[each] for each in classes], root)


def _folder(wanted: ZeroShotData) -> LabelledImages:
    is_imagenet = wanted.data == IMAGENET
    below = wanted.data_root / IMAGENET
    folder = Path(wanted.data) if not is_imagenet else below if below.is_dir() else wanted.data_root
    if wanted.class_names:
        names_of = partial(read_class_names, wanted.class_names)
    elif is_imagenet:
        options = wanted.options
        settings = {"root_option": options.data_root, "names_option": options.class_names}
        names_of = partial(imagenet_folder_names, place=folder, **settings)
    else:
        names_of = partial(_folder_names, folder)
    name = IMAGENET if is_imagenet else folder.resolve().name
    labelled = read_image_folder(folder, name, names_of, all_classes=wanted.all_classes)
    number = len(labelled.class_names)
    if is_imagenet and number not in IMAGENET_SIZES:
        log.warning(f"{folder}: holds {number:,} of ImageNet's 1,000 classes; accuracy is among these {number:,}")
    return labelled


def _folder_names(place: Path, folders: list[str]) -> dict[str, str]:
    """Each folder's own name; ImageNet's where all are its ids, which would say nothing."""
    if all(map(WORDNET_ID.fullmatch, folders)) and (names := imagenet_names()).keys() >= set(folders):
        log.info(f"{place}: the folders are ImageNet's ids, and its names are taken: {names[folders[0]]}, ...")
        return names
    if all(folder.isdigit() for folder in folders):
        log.warning(f"{place}: the classes are called {', '.join(folders[:3])}, ...; name them with a file")
    return {folder: clean_name(folder) for folder in folders}
