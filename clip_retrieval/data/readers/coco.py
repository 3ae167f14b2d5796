"""Reader of COCO captions in the Karpathy split: CLIP_ITM's layout, the official 2014 folders, or the 2017 folders.

The split is given by lists of caption (annotation) ids, `coco_{train,dev,test,restval}_ids.npy`: train indexes
captions_train2014.json, the other three captions_val2014.json. The first of {root}/annotations, {root} and the
project's datasets/annotations that has them is used. The 2017 files hold the same captions under the same ids,
distributed differently over captions_train2017.json and captions_val2017.json, and the same images under shorter
names. Images are in {root}/images, in {root}, or in train2014, val2014, train2017 or val2017 below either, in any
mixture. If there is no captions file, dataset_coco.json is read.

With --annotations FILE, one captions file in COCO's format is used instead. If it is COCO's own, or a part of it,
each split has the captions of its lists that the file holds. Any other file has no splits: all of it is the train
split, and all of it is the test split for `--eval`, like a CSV without a split column. A dataset_*.json is read as
Karpathy's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from clip_retrieval.data.captions import clean_caption
from clip_retrieval.data.dataset import UNSPLIT, RetrievalDataset
from clip_retrieval.data.images.image_files import find_image_files
from clip_retrieval.data.readers import karpathy
from clip_retrieval.data.readers.annotations import ANNOTATIONS, find_file, read_ids
from clip_retrieval.errors import UserError
from clip_retrieval.files import check_root, read_json
from clip_retrieval.options import DatasetOptions

# The id lists of each split, and the 2014 folder of the images and captions of each list.
LISTS = {"train": ("train", "restval"), "val": ("dev",), "test": ("test",)}
FOLDERS = {"train": "train2014", "restval": "val2014", "dev": "val2014", "test": "val2014"}


@dataclass(frozen=True)
class Captions:
    """The content of a captions file.

    Attributes:
        source: the file, for messages.
        ids: int64 (captions,): annotation ids, ascending; dtype object if one has more than 64 bits.
        image_ids: int64 or object (captions,): image id of each caption.
        texts: the captions, in the order of `ids`.
        names: image id -> file name.
    """

    source: str
    ids: np.ndarray
    image_ids: np.ndarray
    texts: list[str]
    names: dict[int, str]

    def find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find ids: the row of each, int64 (ids,), and whether it exists, bool (ids,)."""
        rows = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return rows, self.ids[rows] == ids


def read(options: DatasetOptions, split: str) -> RetrievalDataset | None:
    """Read one split; None if the data set has no such split."""
    root = Path(options.dataset_root)

    # a single captions file
    if options.annotations:
        path = Path(options.annotations)
        if path.name.startswith("dataset_"):
            return karpathy.read(options, split)
        captions = read_captions(path)
        if not is_coco(captions):
            return _build_unsplit(options, split, captions)
        parts = []
        for name in _select_lists(options, split):
            rows, found = captions.find(read_ids(_find_id_file(root, name)))
            parts.append((name, captions, rows[found]))
        return _build_dataset(options, split, parts) if any(len(rows) for _, _, rows in parts) else None

    # a data set folder
    check_root(root)
    if not _find_captions_files(root, "val2014") and karpathy.find_json(root, "coco"):
        return karpathy.read(options, split)
    parts = []
    for name in _select_lists(options, split):
        captions = _read_list_captions(root, FOLDERS[name])
        id_file = _find_id_file(root, name)
        ids = read_ids(id_file)
        rows, found = captions.find(ids)
        if not found.all():
            raise UserError(
                f"{id_file}: {np.sum(~found):,} of its {len(ids):,} caption ids are not in {captions.source}, the "
                f"first is {ids[~found][0]}; both must be of the same data set"
            )
        parts.append((name, captions, rows))
    return _build_dataset(options, split, parts)


def _select_lists(options: DatasetOptions, split: str) -> tuple[str, ...]:
    return ("train",) if split == "train" and options.no_restval else LISTS[split]


def _find_id_file(root: Path, name: str) -> Path:
    file = f"coco_{name}_ids.npy"
    return find_file([root / "annotations" / file, root / file]) or ANNOTATIONS / file


def _find_captions_files(root: Path, folder: str) -> list[Path]:
    """Find the captions file of a 2014 folder, or else those of 2017, which hold the same captions."""
    for names in ([folder], ["train2017", "val2017"]):
        candidates = [[base / f"captions_{name}.json" for base in (root / "annotations", root)] for name in names]
        if found := [path for paths in candidates if (path := find_file(paths))]:
            return found
    return []


def _read_list_captions(root: Path, folder: str) -> Captions:
    paths = _find_captions_files(root, folder)
    if not paths:
        expected = root / "annotations" / f"captions_{folder}.json"
        raise UserError(
            f"{expected}: no such file, nor 2017's; give COCO's folder as --dataset_root, or name a captions file with "
            "--annotations"
        )
    found = [read_captions(path) for path in paths]
    if len(found) == 1:
        return found[0]
    order = np.argsort(np.concatenate([captions.ids for captions in found]), kind="stable")
    texts = [text for captions in found for text in captions.texts]
    return Captions(
        source=" and ".join(captions.source for captions in found),
        ids=np.concatenate([captions.ids for captions in found])[order],
        image_ids=np.concatenate([captions.image_ids for captions in found])[order],
        texts=[texts[i] for i in order.tolist()],
        names={image_id: name for captions in found for image_id, name in captions.names.items()},
    )


# val2014 holds three of the four lists. Arrays and texts are cached, not the many dicts of the JSON.
@functools.lru_cache(maxsize=4)
def read_captions(path: Path) -> Captions:
    """Read a captions file in COCO's format. Raises UserError if it is not one."""
    # parse the file
    data = read_json(path)
    _check_format(data, path)
    names = {image["id"]: image["file_name"] for image in data["images"]}
    annotations = sorted(data["annotations"], key=lambda annotation: annotation["id"])

    # check the ids
    for annotation, following in pairwise(annotations):
        if annotation["id"] == following["id"]:
            raise UserError(f"{path}: two captions have the same id, {annotation['id']}; ids must differ")
    for annotation in annotations:
        if annotation["image_id"] not in names:
            caption, image = annotation["id"], annotation["image_id"]
            raise UserError(f"{path}: caption {caption} belongs to image {image}, which the file does not list")

    # convert to arrays and texts
    ids, image_ids = (_to_array([annotation[key] for annotation in annotations]) for key in ("id", "image_id"))
    texts = [clean_caption(annotation["caption"]) for annotation in annotations]
    return Captions(str(path), ids, image_ids, texts, names)


def _to_array(ids: list[int]) -> np.ndarray:
    """Convert ids to int64 (ids,), or to dtype object if one has more than 64 bits."""
    try:
        return np.array(ids, np.int64)
    except OverflowError:
        return np.array(ids, object)


def _check_format(data: Any, path: Path) -> None:
    """Raise UserError unless `data` is the content of a captions file."""
    kind = f"{path}: not a captions file in COCO's format"
    if not isinstance(data, dict):
        raise UserError(f"{kind} (it holds a {type(data).__name__}, not images and annotations)")
    for key, fields in (
        ("images", {"id": int, "file_name": str}),
        ("annotations", {"id": int, "image_id": int, "caption": str}),
    ):
        if not isinstance(data.get(key), list):
            raise UserError(f'{kind} (no list "{key}")')
        for number, item in enumerate(data[key]):
            for name, kind_of in fields.items():
                if not isinstance(item, dict) or type(item.get(name)) is not kind_of:
                    noun = {int: "whole number", str: "text"}[kind_of]
                    raise UserError(f'{kind} ({key}[{number}] has no "{name}" that is a {noun})')
    if not data["annotations"]:
        raise UserError(f"{path}: holds no captions")


def is_coco(captions: Captions) -> bool:
    """Whether the file is COCO's own or a part of it.

    Ids alone do not decide: the user's captions may have low ids too. Images must have COCO's names, and captions of
    one image in the id lists (five each, consecutive) must belong to one image in the file as well: this excludes
    other captions of the same photographs.
    """
    name_format = re.compile(r"(?:.*/)?(?:COCO_(?:train|val)2014_)?(\d{12})\.jpg")
    for image_id, name in captions.names.items():
        match = name_format.fullmatch(name)
        if not match or int(match[1]) != image_id:
            return False
    lists = [read_ids(ANNOTATIONS / f"coco_{name}_ids.npy") for name in FOLDERS]
    rows, found = captions.find(np.concatenate(lists))
    listed_images = np.flatnonzero(found) // 5
    file_images, index = np.unique(captions.image_ids[rows[found]], return_inverse=True)
    together = np.unique(listed_images * (len(file_images) + 1) + index)
    return 0 < len(together) == len(file_images) == len(np.unique(listed_images))


def _build_dataset(
    options: DatasetOptions, split: str, parts: list[tuple[str, Captions, np.ndarray]]
) -> RetrievalDataset:
    """Build the data set from (list name, captions, rows of them), images in the order of their captions."""
    # number the images and collect their possible names
    images: dict[int, int] = {}  # image id -> index
    names, names_2014 = [], []
    for name, captions, rows in parts:
        for image_id in captions.image_ids[rows].tolist():
            if image_id not in images:
                images[image_id] = len(images)
                names.append(captions.names[image_id])
                names_2014.append(f"COCO_{FOLDERS[name]}_{image_id:012d}.jpg")
    names_2017 = [f"{image_id:012d}.jpg" for image_id in images]

    # captions, pairs and image files
    text_ids = np.concatenate([captions.ids[rows] for _, captions, rows in parts]).tolist()
    texts = [captions.texts[row] for _, captions, rows in parts for row in rows.tolist()]
    image_ids = np.concatenate([captions.image_ids[rows] for _, captions, rows in parts]).tolist()
    pairs = np.stack([[images[image_id] for image_id in image_ids], np.arange(len(texts))], axis=1)
    source = " and ".join(dict.fromkeys(captions.source for _, captions, _ in parts))
    found = find_image_files(
        _iter_places(options, names, names_2014, names_2017), source, skip_missing=options.skip_broken
    )
    return RetrievalDataset(options.name, split, found, texts, pairs, list(images), text_ids)


def _list_folders(options: DatasetOptions) -> list[Path]:
    if options.image_dir:
        return [Path(options.image_dir)]
    roots = [Path(options.dataset_root), *([Path(options.annotations).parent] if options.annotations else [])]
    return [folder for root in roots for folder in (root / "images", root)]


def _iter_places(
    options: DatasetOptions, names: list[str], names_2014: list[str], names_2017: list[str]
) -> Iterator[tuple[Path, list[str]]]:
    """Yield the folders that may hold the images, with the names there: the captions file's, 2014's and 2017's."""
    for folder in _list_folders(options):
        yield folder, names
    for folder in _list_folders(options):
        for place in (folder / "train2014", folder / "val2014", folder):
            yield place, names_2014
        for place in (folder / "train2017", folder / "val2017", folder):
            yield place, names_2017


def _build_unsplit(options: DatasetOptions, split: str, captions: Captions) -> RetrievalDataset | None:
    """Build train or test of all captions; images without captions stay, as images to be retrieved."""
    if split == "val":
        return None
    indices = {image_id: i for i, image_id in enumerate(captions.names)}
    pairs = np.array([(indices[image_id], i) for i, image_id in enumerate(captions.image_ids.tolist())])
    names = list(captions.names.values())
    places = [(folder, names) for folder in _list_folders(options)]
    images = find_image_files(places, captions.source, skip_missing=options.skip_broken)
    return RetrievalDataset(
        options.name, UNSPLIT, images, captions.texts, pairs, list(captions.names), captions.ids.tolist()
    )
