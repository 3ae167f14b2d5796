"""Flickr30K, Flickr8K and everything else in Karpathy's JSON; the Flickr sets also as captions annotations.

Karpathy's JSON ({root}/dataset_{name}.json, also .json.gz; any single dataset_*.json for `--dataset karpathy`) lists
images with file name, split and sentences. restval belongs to train unless --no_restval. An image without sentences
stays: it is one that no caption describes.

Where there is none, Flickr8K and Flickr30K are read from the captions files that are passed around instead:
`image_name| comment_number| comment` (results.csv), `image,caption` (captions.txt) and the authors' own
`name.jpg#0<tab>caption` (*.token), with Karpathy's split from the project's datasets/annotations.
"""

from __future__ import annotations

import functools
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clip_retrieval.data.captions import clean_caption
from clip_retrieval.data.dataset import SPLITS, RetrievalDataset
from clip_retrieval.data.images.image_files import find_image_files
from clip_retrieval.data.readers import annotations, csv_file
from clip_retrieval.errors import UserError
from clip_retrieval.files import check_root, read_json, read_text
from clip_retrieval.options import DataOptions

FLICKR = ("flickr8k", "flickr30k")

# Where the archives of the data sets put the images, below the root.
IMAGE_FOLDERS = {
    "flickr8k": ("Images", "Flicker8k_Dataset", "Flickr8k_Dataset"),
    "flickr30k": ("flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images", "Images"),
}
CAPTIONS_FILES = {
    "flickr8k": ("results.csv", "captions.txt", "captions.csv", "Flickr8k.token.txt"),
    "flickr30k": ("results.csv", "captions.txt", "captions.csv", "results_20130124.token"),
}


@dataclass
class Part:
    """The images of one split with their captions.

    Attributes:
        names: file names.
        folders: the folder each image is said to be in, "" where none is.
        texts: the captions.
        owners: index of the image that each caption describes.
    """

    names: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)

    def add(self, name: str, folder: str, texts: list[str]) -> None:
        self.owners += [len(self.names)] * len(texts)
        self.names.append(name)
        self.folders.append(folder)
        self.texts += texts


def read(options: DataOptions, split: str) -> RetrievalDataset | None:
    """Read one split; None where the data set has no such split."""
    path = _find(options)
    if path.name.endswith((".json", ".json.gz")):
        parts = read_karpathy_json(path)
    elif options.dataset in FLICKR:
        parts = read_captions(path, options.dataset)
    else:
        raise UserError(f"{path}: not a .json or .json.gz file, as --dataset {options.dataset} needs")
    names = ("train", "restval") if split == "train" and not options.no_restval else (split,)
    chosen = Part()
    for part in (parts[name] for name in names if name in parts):
        chosen.owners += [len(chosen.names) + owner for owner in part.owners]
        chosen.names += part.names
        chosen.folders += part.folders
        chosen.texts += part.texts
    if not chosen.names:
        return None
    if not chosen.texts:
        raise UserError(f"{path}: none of the {len(chosen.names):,} {split} images has a caption")
    images = find_image_files(_places(options, path, chosen), path)
    pairs = np.stack([chosen.owners, np.arange(len(chosen.texts))], axis=1)
    return RetrievalDataset(options.dataset, split, images, chosen.texts, pairs)


def _find(options: DataOptions) -> Path:
    """The file that lists the images."""
    if options.annotations:
        return Path(options.annotations)
    root, name = Path(options.dataset_root), options.dataset
    if name == "karpathy":
        return annotations.only_file(root, ["dataset_*.json", "dataset_*.json.gz"])
    check_root(root)
    found = find_json(root, name)
    folders = [root, *(root / folder for folder in IMAGE_FOLDERS.get(name, ()))]
    usual = CAPTIONS_FILES.get(name, ())
    found = found or annotations.first_file(folder / file for folder in folders for file in usual)
    if not found:
        others = f" (nor {', '.join(usual)})" if usual else ""
        raise UserError(f"{root / f'dataset_{name}.json'}: no such file{others}; name it with --annotations")
    return found


def find_json(root: Path, name: str) -> Path | None:
    """The Karpathy JSON of a data set."""
    return annotations.first_file([root / f"dataset_{name}.json", root / f"dataset_{name}.json.gz"])


def _places(options: DataOptions, path: Path, part: Part) -> Iterator[tuple[Path, list[str]]]:
    """Where the images may be, and under which names there."""
    root = Path(options.dataset_root)
    if options.image_dir:
        folders = [Path(options.image_dir)]
    else:
        usual = (root / folder for folder in IMAGE_FOLDERS.get(options.dataset, ()))
        folders = [root / "images", *usual, root, path.parent / "images", path.parent]
    in_folders = [f"{folder}/{name}" if folder else name for folder, name in zip(part.folders, part.names)]
    for folder in dict.fromkeys(folders):
        yield folder, in_folders
        if any(part.folders):
            yield folder, part.names


# Karpathy's COCO file takes gigabytes as parsed; what is kept for the other splits is a few plain lists.
@functools.lru_cache(maxsize=1)
def read_karpathy_json(path: Path) -> dict[str, Part]:
    """Read a Karpathy JSON: its images by split (train, restval, val, test). Raises UserError where it is not one."""
    data = read_json(path)
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list):
        raise UserError(f'{path}: not a Karpathy JSON (no list "images")')
    if not images:
        raise UserError(f"{path}: lists no images")
    parts: dict[str, Part] = {}
    for number, image in enumerate(images):
        where = f"{path}: not a Karpathy JSON (images[{number}]"
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str) or not image["filename"]:
            raise UserError(f'{where} has no "filename")')
        named = image.get("split")
        split = {"restval": "restval", **SPLITS}.get(named) if isinstance(named, str) else None
        if split is None:
            raise UserError(
                f"{where}, {image['filename']}, has the split {reprlib.repr(named)}, not one of train, restval, val, "
                "test)"
            )
        texts = _sentences(image.get("sentences"))
        if texts is None:
            raise UserError(f'{where}, {image["filename"]}, has no "sentences", each with a "raw" text)')
        folder = image.get("filepath")
        parts.setdefault(split, Part()).add(image["filename"], folder if isinstance(folder, str) else "", texts)
    return parts


def _sentences(sentences: Any) -> list[str] | None:
    """The texts; None where the sentences are not as Karpathy's."""
    if not isinstance(sentences, list):
        return None
    if not all(isinstance(s, dict) and isinstance(s.get("raw"), str) for s in sentences):
        return None
    return [clean_caption(sentence["raw"]) for sentence in sentences]


@functools.lru_cache(maxsize=1)
def read_captions(path: Path, name: str) -> dict[str, Part]:
    """Read a captions file of Flickr8K or Flickr30K, split by the project's lists, images in their order."""
    captions: dict[str, list[str]] = {}
    for image, text in _image_captions(path):
        captions.setdefault(image, []).append(text)
    if not captions:
        raise UserError(f"{path}: holds no captions")
    parts: dict[str, Part] = {}
    for split in ("train", "val", "test"):
        part = Part()
        for image in read_text(annotations.ANNOTATIONS / f"{name}_{split}.txt").split():
            if image in captions:
                part.add(image, "", captions[image])
        if part.names:
            parts[split] = part
    if not parts:
        raise UserError(f"{path}: none of its images is in the split of {name}; a file of your own is --dataset csv")
    return parts


def _image_captions(path: Path) -> Iterator[tuple[str, str]]:
    """(image, caption) for each line of the file, in whichever of the three forms it has."""
    lines = read_text(path).split("\n")
    header = lines[0]
    if re.match(r"[^|,\t]+#\d+\t", header):
        form, skip = re.compile(r"([^\t]+)#\d+\t(.*)"), 0
    elif "|" in header:
        # Image 2199200615.jpg, comment 4, of results.csv lacks its second bar.
        form, skip = re.compile(r"([^|]+)\|\s*\d+(?:\s*\||\s)(.*)"), 1
    else:
        for row in csv_file.read_table(path, ("image", "image_name"), ("caption", "comment")):
            yield row.image, clean_caption(row.caption)
        return
    for number, line in enumerate(lines[skip:], 1 + skip):
        if not line.strip():
            continue
        match = form.fullmatch(line.strip(" \r"))
        if not match or not match[1].strip() or not match[2].strip():
            raise UserError(f"{path}, line {number}: not an image and a caption: {line[:60]!r}")
        yield match[1].strip(), clean_caption(match[2])
