"""Reader of Chinese-CLIP's data: `{split}_imgs.tsv` and `{split}_texts.jsonl`, or LMDB folders built from them.

    DATA/train_imgs.tsv      image id <tab> base64 of the image file
    DATA/train_texts.jsonl   {"text_id": 8428, "text": "...", "image_ids": [1076345, 517602]}
    DATA/lmdb/train/imgs     image id -> base64, and num_images
    DATA/lmdb/train/pairs    0, 1, ... -> pickle of (image id, text id, text), and num_samples

The val split is called valid here. LMDB folders take precedence. --train_data and --val_data name a split's LMDB
folder, its tsv, or the common prefix of its tsv and jsonl (`DATA/train`). Ids keep their types, numbers or texts. A
text may have several images, or none in a test set without answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_retrieval.data.captions import clean_caption, mend_characters
from clip_retrieval.data.dataset import SPLITS, RetrievalDataset
from clip_retrieval.data.images.base64_images import Base64Images, TsvImages, infer_id_types
from clip_retrieval.data.images.lmdb_folder import LmdbImages, read_pairs, read_texts_without_image
from clip_retrieval.errors import UserError
from clip_retrieval.files import check_root
from clip_retrieval.jsonl import is_id, read_records
from clip_retrieval.options import DatasetOptions

IMAGES, TEXTS = "_imgs.tsv", "_texts.jsonl"
# The names of each split in file names, Chinese-CLIP's own first.
NAMES = {
    split: sorted((name for name, target in SPLITS.items() if target == split), key="valid".__ne__)
    for split in ("train", "val", "test")
}


class Text(NamedTuple):
    """A text, the ids of its images, and its place: line number in the jsonl, or key in the LMDB."""

    text_id: int | str
    text: str
    image_ids: list[int | str]
    number: int


@dataclass(frozen=True)
class Texts:
    """The texts of a split. Several records with the same id are the same text.

    Attributes:
        path: the jsonl, or the `pairs` folder.
        unit: "line" or "key".
        records: one per line, or one per pair.

    Raises:
        UserError: records with the same id have different texts.
    """

    path: Path
    unit: str
    records: list[Text]

    def __post_init__(self) -> None:
        first: dict[int | str, Text] = {}
        for text in self.records:
            other = first.setdefault(text.text_id, text)
            if other.text != text.text:
                raise UserError(
                    f"{self.locate(text)}: text {text.text_id} differs from {self.unit} {other.number}; give "
                    "each text its own id"
                )

    def locate(self, text: Text) -> str:
        return f"{self.path}, {self.unit} {text.number}"

    def iter_pairs(self, keys: Sequence[str], source: Path) -> Iterator[tuple[Text, int | str, int]]:
        """Yield (record, image id, image index) for each image of each record.

        Args:
            keys: the image ids as texts.
            source: file or folder of the images, for messages.

        Raises:
            UserError: a record names an unknown image.
        """
        index_of = {key: index for index, key in enumerate(keys)}
        for text in self.records:
            for image_id in text.image_ids:
                index = index_of.get(str(image_id))
                if index is None:
                    raise UserError(
                        f"{self.locate(text)}: there is no image {image_id} in {source}; both must be of the same split"
                    )
                yield text, image_id, index


@dataclass(frozen=True)
class Place:
    """The place of a split: an LMDB folder, or the common prefix of a tsv and a jsonl."""

    path: Path
    is_lmdb: bool

    @property
    def images(self) -> Path:
        return self.path / "imgs" if self.is_lmdb else Path(f"{self.path}{IMAGES}")

    @property
    def texts(self) -> Path:
        return self.path / "pairs" if self.is_lmdb else Path(f"{self.path}{TEXTS}")


def read(options: DatasetOptions, split: str) -> RetrievalDataset | None:
    """Read one split; None if the data set has no such split."""
    named = {"train": options.train_data, "val": options.val_data}.get(split)
    if named:
        place = find_named_place(Path(named), split)
        if place is None:
            option = f"--{split}_data"
            raise UserError(
                f"{option} {named}: neither an LMDB folder (with imgs/ and pairs/) nor the prefix of a ...{IMAGES} and "
                f"a ...{TEXTS}; name one of them"
            )
    else:
        place = _find_place(options, split)
    if place is None:
        return None
    images = open_images(place.images)
    texts = read_lmdb_texts(place.path) if place.is_lmdb else read_texts(place.texts)
    return _build_dataset(options.name, split, images, texts)


def find_named_place(path: Path, split: str) -> Place | None:
    """Find a split by an LMDB folder, a tsv or jsonl, their common prefix, or the folder of a data set."""
    if (path / "imgs").is_dir():
        return Place(path, True)
    for ending in (IMAGES, TEXTS):
        if path.name.endswith(ending):
            path = path.with_name(path.name.removesuffix(ending))
    prefix = Place(path, False)
    if prefix.images.is_file() or prefix.texts.is_file():
        return prefix
    return _find_in_root(path, split)


def _find_in_root(root: Path, split: str) -> Place | None:
    """Find a split's LMDB folder, or else its tsv and jsonl, in the folder of a data set."""
    lmdbs = (Place(root / "lmdb" / name, True) for name in NAMES[split])
    prefixes = (Place(root / name, False) for name in NAMES[split])
    found = next((place for place in lmdbs if place.path.is_dir()), None)
    return found or next((place for place in prefixes if place.images.is_file() or place.texts.is_file()), None)


def _find_place(options: DatasetOptions, split: str) -> Place | None:
    root = Path(options.dataset_root)
    if place := _find_in_root(root, split):
        return place
    if options.train_data or options.val_data:
        return None  # the root may be missing
    check_root(root)
    if not any(_find_in_root(root, other) for other in NAMES):
        raise UserError(
            f"{root}: holds neither lmdb/{{train,valid,test}} nor {{train,valid,test}}{IMAGES} and ...{TEXTS}; give "
            "the folder of the data set as --dataset_root, or its parts as --train_data and --val_data"
        )
    return None


def open_images(path: Path) -> Base64Images:
    """Open the images of a `{split}_imgs.tsv` or of an LMDB's `imgs` folder."""
    return LmdbImages(path) if path.is_dir() else TsvImages(path)


def read_texts(path: Path) -> Texts:
    """Read a `{split}_texts.jsonl`. Raises UserError, naming file and line, if a line is invalid."""
    texts = [_parse_text(record, number, f"{path}, line {number}") for number, record in read_records(path)]
    if not texts:
        raise UserError(f"{path}: holds no texts")
    return Texts(path, "line", texts)


def _parse_text(record: dict[str, Any], number: int, place: str) -> Text:
    text_id, text, image_ids = (record.get(name) for name in ("text_id", "text", "image_ids"))
    if not is_id(text_id):
        raise UserError(f'{place}: no "text_id" that is a whole number or a text')
    if type(text) in (int, float):  # as Chinese-CLIP does
        text = str(text)
    if not isinstance(text, str):
        raise UserError(f'{place}: no "text"')
    image_ids = [] if image_ids is None else image_ids
    if not isinstance(image_ids, list) or not all(map(is_id, image_ids)):
        raise UserError(f'{place}: "image_ids" is not a list of whole numbers or texts')
    return Text(text_id, mend_characters(text), image_ids, number)


def read_lmdb_texts(folder: Path) -> Texts:
    """Read the texts of an LMDB folder, one record per pair.

    Chinese-CLIP's LMDB lacks texts without an image. If it has no texts at all, as for a test set without answers,
    they are read from the jsonl beside the folder `lmdb`.
    """
    pairs = folder / "pairs"
    found = (
        (key, {"text_id": text_id, "text": text, "image_ids": [image_id]})
        for key, (image_id, text_id, text) in read_pairs(pairs)
    )
    texts = [_parse_text(record, key, f"{pairs}, key {key}") for key, record in found]
    for number, record in enumerate(read_texts_without_image(pairs), len(texts)):
        texts.append(_parse_text(record, number, f"{pairs}, text {number}"))
    if not texts:
        beside = folder.parent.parent / f"{folder.name}{TEXTS}"
        if not beside.is_file():
            raise UserError(f"{pairs}: holds no texts, and {beside} with texts without images is missing")
        return read_texts(beside)
    return Texts(pairs, "key", texts)


def _build_dataset(name: str, split: str, images: Base64Images, texts: Texts) -> RetrievalDataset:
    caption_of: dict[int | str, int] = {}
    captions: list[str] = []
    for text in texts.records:
        if caption_of.setdefault(text.text_id, len(captions)) == len(captions):
            captions.append(clean_caption(text.text))
    pairs = [(image, caption_of[text.text_id]) for text, _, image in texts.iter_pairs(images.keys, images.path)]
    image_ids = infer_id_types(images.keys, (image_id for text in texts.records for image_id in text.image_ids))
    return RetrievalDataset(name, split, images, captions, np.array(pairs, np.int64), image_ids, list(caption_of))
