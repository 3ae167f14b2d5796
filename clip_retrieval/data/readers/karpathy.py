"""Reader of Karpathy's JSON (Flickr30K, Flickr8K and others), and of the Flickr captions files.

Karpathy's JSON ({root}/dataset_{name}.json, also .json.gz; any single dataset_*.json for `--dataset karpathy`) lists
images with file name, split and sentences. restval belongs to train unless --no_restval. Images without sentences stay,
as images to be retrieved.

Without a JSON, Flickr8K and Flickr30K are read from one of the captions files in circulation:
`image_name| comment_number| comment` (results.csv), `image,caption` (captions.txt) and the authors' own
`name.jpg#0<tab>caption` (*.token), with Karpathy's split from the project's datasets/annotations.
"""

from __future__ import annotations

import functools
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_retrieval.data.captions import clean_caption
from clip_retrieval.data.dataset import SPLITS, RetrievalDataset
from clip_retrieval.data.images.image_files import find_image_files
from clip_retrieval.data.negatives import clean_negatives
from clip_retrieval.data.readers import csv_file
from clip_retrieval.data.readers.annotations import ANNOTATIONS, find_file, find_only_file
from clip_retrieval.errors import UserError, format_count
from clip_retrieval.files import check_root, read_json, read_text
from clip_retrieval.jsonl import Id, is_id
from clip_retrieval.options import DatasetOptions, as_tuple

FLICKR = ("flickr8k", "flickr30k")

# Folders of the images in the archives of the data sets.
IMAGE_FOLDERS = {
    "flickr8k": ("Images", "Flicker8k_Dataset", "Flickr8k_Dataset"),
    "flickr30k": ("flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images", "Images"),
}
CAPTIONS_FILES = {
    "flickr8k": ("results.csv", "captions.txt", "captions.csv", "Flickr8k.token.txt"),
    "flickr30k": ("results.csv", "captions.txt", "captions.csv", "results_20130124.token"),
}


class ListedImage(NamedTuple):
    """An image in the file.

    Attributes:
        name: file name.
        folder: its folder as the file gives it, or "".
        texts: its captions.
        image_id: COCO's id, or None.
        text_ids: id of each caption ("sentid"), or None.
        negatives: the negative captions of each caption, if they are read.
    """

    name: str
    folder: str
    texts: list[str]
    image_id: Any
    text_ids: list[Any]
    negatives: list[list[str]]


def read(options: DatasetOptions, split: str) -> RetrievalDataset | None:
    """Read one split; None if the data set has no such split."""
    # read the file
    path = _find_file(options)
    if path.name.endswith((".json", ".json.gz")):
        parts = read_karpathy_json(path, options.negative_column)
    elif options.name in FLICKR:
        parts = read_captions(path, options.name)
    else:
        raise UserError(f"{path}: not a .json or .json.gz file, as --dataset {options.name} needs")
    # join the parts of the split
    names = ("train", "restval") if split == "train" and not options.no_restval else (split,)
    listed = [image for name in names for image in parts.get(name, ())]
    texts = [text for image in listed for text in image.texts]
    if not listed:
        return None
    if not texts:
        raise UserError(f"{path}: none of {format_count(len(listed), f'{split} image')} has a caption")
    images = find_image_files(_iter_places(options, path, listed), path, skip_missing=options.skip_broken)
    owners = np.repeat(np.arange(len(listed)), [len(image.texts) for image in listed])
    pairs = np.stack([owners, np.arange(len(texts))], axis=1)
    image_ids = _unique_ids([image.image_id for image in listed])
    text_ids = _unique_ids([text_id for image in listed for text_id in image.text_ids])
    negatives = None
    if options.negative_column and split == "train":
        given = [negatives for image in listed for negatives in image.negatives]
        negatives = clean_negatives(path, options.negative_column, texts, owners.tolist(), given)
    return RetrievalDataset(options.name, split, images, texts, pairs, image_ids, text_ids, negatives)


def _unique_ids(ids: list[Any]) -> list[Id] | None:
    """Return the ids, or None if one is missing or duplicate."""
    return ids if all(map(is_id, ids)) and len(set(ids)) == len(ids) else None


def _find_file(options: DatasetOptions) -> Path:
    """Find the file that lists the images."""
    if options.annotations:
        return Path(options.annotations)
    root, name = Path(options.dataset_root), options.name
    if name == "karpathy":
        return find_only_file(root, ["dataset_*.json", "dataset_*.json.gz"])
    check_root(root)
    found = find_json(root, name)
    folders = [root, *(root / folder for folder in IMAGE_FOLDERS.get(name, ()))]
    usual = CAPTIONS_FILES.get(name, ())
    found = found or find_file(folder / file for folder in folders for file in usual)
    if not found:
        others = f" (nor {', '.join(usual)})" if usual else ""
        raise UserError(
            f"{root / f'dataset_{name}.json'}: no such file{others}; give the folder of the data set as "
            "--dataset_root, or name the file with --annotations"
        )
    return found


def find_json(root: Path, name: str) -> Path | None:
    """Find the Karpathy JSON of a data set."""
    return find_file([root / f"dataset_{name}.json", root / f"dataset_{name}.json.gz"])


def _iter_places(options: DatasetOptions, path: Path, listed: list[ListedImage]) -> Iterator[tuple[Path, list[str]]]:
    """Yield the folders that may hold the images, with the names there."""
    root = Path(options.dataset_root)
    if options.image_dir:
        folders = [Path(options.image_dir)]
    else:
        usual = (root / folder for folder in IMAGE_FOLDERS.get(options.name, ()))
        folders = [root / "images", *usual, root, path.parent / "images", path.parent]
    names = [image.name for image in listed]
    in_folders = [f"{image.folder}/{image.name}" if image.folder else image.name for image in listed]
    for folder in dict.fromkeys(folders):
        yield folder, in_folders
        if in_folders != names:
            yield folder, names


# Parsed, Karpathy's COCO file takes gigabytes; plain lists of it are cached for the other splits.
@functools.lru_cache(maxsize=1)
def read_karpathy_json(path: Path, negative_key: str | None = None) -> dict[str, list[ListedImage]]:
    """Read the images of a Karpathy JSON by split (train, restval, val, test). Raises UserError if it is invalid.

    negative_key: the key of a sentence's negative captions, a text or a list of texts.
    """
    data = read_json(path)
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list):
        raise UserError(f'{path}: not a Karpathy JSON (no list "images")')
    if not images:
        raise UserError(f"{path}: lists no images")

    # check each image and add it to its split
    parts: dict[str, list[ListedImage]] = {}
    for number, image in enumerate(images):
        prefix = f"{path}: not a Karpathy JSON (images[{number}]"
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str) or not image["filename"]:
            raise UserError(f'{prefix} has no "filename")')
        name = image.get("split")
        split = {"restval": "restval", **SPLITS}.get(name) if isinstance(name, str) else None
        if split is None:
            raise UserError(
                f"{prefix}, {image['filename']}, has the split {reprlib.repr(name)}, not one of train, restval, val, "
                "test)"
            )
        texts = _read_sentences(image.get("sentences"))
        if texts is None:
            raise UserError(f'{prefix}, {image["filename"]}, has no "sentences", each with a "raw" text)')
        folder = image.get("filepath")
        text_ids = [sentence.get("sentid") for sentence in image["sentences"]]
        given = [_read_negatives(sentence.get(negative_key)) for sentence in image["sentences"] if negative_key]
        negatives = [found for found in given if found is not None]
        if len(negatives) < len(given):
            raise UserError(f"{prefix}, {image['filename']}, has {negative_key!r} that is no text or list of texts)")
        folder = folder if isinstance(folder, str) else ""
        found = ListedImage(image["filename"], folder, texts, image.get("cocoid"), text_ids, negatives)
        parts.setdefault(split, []).append(found)
    return parts


def _read_sentences(sentences: Any) -> list[str] | None:
    """Return the captions, or None if the sentences are not in Karpathy's format."""
    if not isinstance(sentences, list):
        return None
    if not all(isinstance(s, dict) and isinstance(s.get("raw"), str) for s in sentences):
        return None
    return [clean_caption(sentence["raw"]) for sentence in sentences]


def _read_negatives(value: Any) -> list[str] | None:
    """Return the negative captions of a sentence, or None if they are invalid."""
    texts = [] if value is None else as_tuple(value)
    return list(texts) if all(isinstance(text, str) for text in texts) else None


@functools.lru_cache(maxsize=1)
def read_captions(path: Path, name: str) -> dict[str, list[ListedImage]]:
    """Read a captions file of Flickr8K or Flickr30K; the project's lists give the splits and the order of images."""
    captions: dict[str, list[str]] = {}
    for image, text in _iter_captions(path):
        captions.setdefault(image, []).append(text)
    if not captions:
        raise UserError(f"{path}: holds no captions")
    parts: dict[str, list[ListedImage]] = {}
    for split in ("train", "val", "test"):
        for image in read_text(ANNOTATIONS / f"{name}_{split}.txt").split():
            if texts := captions.get(image):
                found = ListedImage(image, "", texts, None, [None] * len(texts), [[]] * len(texts))
                parts.setdefault(split, []).append(found)
    if not parts:
        raise UserError(f"{path}: none of its images is in the split of {name}; read your own file with --dataset csv")
    return parts


def _iter_captions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (image, caption) for each line of the file, in any of the three formats."""
    # detect the format
    lines = read_text(path).split("\n")
    header = lines[0]
    if re.match(r"[^|,\t]+#\d+\t", header):
        pattern, skip = re.compile(r"([^\t]+)#\d+\t(.*)"), 0
    elif "|" in header:
        # In results.csv, comment 4 of image 2199200615.jpg lacks its second bar.
        pattern, skip = re.compile(r"([^|]+)\|\s*\d+(?:\s*\||\s)(.*)"), 1
    else:
        for row in csv_file.read_table(path, ("image", "image_name"), ("caption", "comment")):
            yield row.image, clean_caption(row.caption)
        return
    # parse the lines
    for number, line in enumerate(lines[skip:], 1 + skip):
        if not line.strip():
            continue
        match = pattern.fullmatch(line.strip(" \r"))
        if not match or not match[1].strip():
            raise UserError(f"{path}, line {number}: not an image and a caption: {line[:60]!r}")
        yield match[1].strip(), clean_caption(match[2])
