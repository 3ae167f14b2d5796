"""Read labelled images, given the name of a data set or a folder."""

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
from clip_retrieval.classification.folder import LabelledImages, choose_split_folder, read_image_folder
from clip_retrieval.classification.templates import DEFAULT_SETS, Templates, choose_templates
from clip_retrieval.errors import UserError
from clip_retrieval.files import path_exists
from clip_retrieval.log import log

IMAGENET = "imagenet"
IMAGENET_SIZES = (1000, 200)  # classes of ImageNet, V2 and Sketch; classes of A and R
WORDNET_ID = re.compile(r"n\d{8}")
NAMES = (*OFFICIAL_NAMES, IMAGENET)


@dataclass(frozen=True)
class OptionNames:
    """Names of the running program's options, for messages; None if it has no such option."""

    data_root: str = "--data_root"
    class_names: str = "--class_names"
    templates: str = "--templates"
    download: str | None = "--download"


@dataclass(frozen=True)
class ZeroShotData:
    """The data set, class names and templates of a zero-shot classification.

    Attributes:
        data: cifar10, cifar100, stl10, imagenet, or the path of a folder with one folder of images per class.
        data_root: folder of a named data set: it holds the archive, its extracted folder, or the class folders of
            ImageNet or a variant; or it holds such a folder under the data set's name.
        class_names: file of class names (see `read_class_names`) that replaces the data set's own names.
        all_classes: also count as candidates the classes of this file, or of ImageNet, that have no folder.
        templates: name of a template set, or a file.
        template: the templates themselves.
        download: fetch a missing archive.
        options: names of the options in messages.
    """

    data: str
    data_root: Path = Path("datasets")
    class_names: Path | None = None
    all_classes: bool = False
    templates: str | None = None
    template: tuple[str, ...] = ()
    download: bool = False
    options: OptionNames = OptionNames()


def read_labelled(request: ZeroShotData) -> tuple[LabelledImages, Templates]:
    """Read the labelled images and choose their templates.

    Raises UserError, naming the file or folder, if it is missing or invalid.
    """
    if request.download and request.data not in OFFICIAL_NAMES:
        raise UserError(f"--download fetches only {', '.join(OFFICIAL_NAMES)}, not {request.data}; drop --download")
    if request.all_classes and request.data != IMAGENET and request.class_names is None:
        raise UserError("--all_classes reads the classes from --class_names; give the file, or drop the option")
    if request.data in OFFICIAL_NAMES:
        labelled = _read_archive(request)
    elif request.data == IMAGENET or path_exists(request.data):
        labelled = _read_folder(request)
    else:
        remedy = "" if request.options.download else "; --zero_shot_eval none turns it off"
        raise UserError(f"{request.data}: no such folder of images, and not one of {', '.join(NAMES)}{remedy}")
    default = DEFAULT_SETS.get(request.data, "imagenet")
    templates = choose_templates(
        request.templates, request.template, labelled.class_names, default, option=request.options.templates
    )
    return replace(labelled, names_file=request.class_names), templates


def _read_archive(request: ZeroShotData) -> LabelledImages:
    from clip_retrieval.classification.archives import archive_root, read_archive

    data, file, options = request.data, request.class_names, request.options
    if request.all_classes:
        raise UserError(f"--all_classes: only for folders, {data} has images of all its classes; drop the option")
    remedy = f"fetch it with {options.download}" if options.download else f"give its folder as {options.data_root}"
    root = archive_root(data, request.data_root)
    images, labels, classes = read_archive(data, root, download=request.download, remedy=remedy)
    names = read_class_names(file, classes) if file else {each: clean_name(each) for each in classes}
    if missing := [each for each in classes if each not in names]:
        raise UserError(f'{file}: has no name for the class "{missing[0]}" of {data}; add it')
    return LabelledImages(data, images, labels, [names[each] for each in classes], root)


def _read_folder(request: ZeroShotData) -> LabelledImages:
    is_imagenet = request.data == IMAGENET
    subfolder = request.data_root / IMAGENET
    folder = Path(request.data) if not is_imagenet else subfolder if subfolder.is_dir() else request.data_root
    folder = choose_split_folder(folder)
    if request.class_names:
        name_folders = partial(read_class_names, request.class_names)
    elif is_imagenet:
        options = request.options
        settings = {"root_option": options.data_root, "names_option": options.class_names}
        name_folders = partial(imagenet_folder_names, place=folder, **settings)
    else:
        name_folders = partial(_name_folders, folder)
    name = IMAGENET if is_imagenet else folder.resolve().name
    labelled = read_image_folder(folder, name, name_folders, all_classes=request.all_classes)
    number = len(labelled.class_names)
    if is_imagenet and number not in IMAGENET_SIZES:
        log.warning(f"{folder}: holds {number:,} of ImageNet's 1,000 classes; accuracy is over these {number:,} only")
    return labelled


def _name_folders(place: Path, folders: list[str]) -> dict[str, str]:
    """Name each folder after itself, or, if all are WordNet ids of ImageNet, by ImageNet's class names."""
    if all(map(WORDNET_ID.fullmatch, folders)) and (names := imagenet_names()).keys() >= set(folders):
        log.info(f"{place}: the folders are ImageNet's ids; using ImageNet's class names: {names[folders[0]]}, ...")
        return names
    if all(folder.isdigit() for folder in folders):
        log.warning(f"{place}: the class names are numbers: {', '.join(folders[:3])}, ...; give a file of class names")
    return {folder: clean_name(folder) for folder in folders}
