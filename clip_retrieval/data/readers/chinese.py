"""Chinese-CLIP's data: `{split}_imgs.tsv` and `{split}_texts.jsonl`, or the LMDB folders that are built from them.

    DATA/train_imgs.tsv      image id <tab> base64 of the image file
    DATA/train_texts.jsonl   {"text_id": 8428, "text": "...", "image_ids": [1076345, 517602]}
    DATA/lmdb/train/imgs     image id -> base64, and num_images
    DATA/lmdb/train/pairs    0, 1, ... -> pickle of (image id, text id, text), and num_samples

The val split is called valid there. The LMDB folders go first; --train_data and --val_data name a split's LMDB folder,
its tsv, or what the names of its tsv and jsonl begin with (`DATA/train`). Ids are kept as they are, numbers or texts.
A text may have several images, or, in a test set without answers, none.
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
from clip_retrieval.options import DataOptions

IMAGES, TEXTS = "_imgs.tsv", "_texts.jsonl"
# What each split is called in file names, Chinese-CLIP's own first.
NAMES = {
    split: sorted((name for name, of in SPLITS.items() if of == split), key="valid".__ne__)
    for split in ("train", "val", "test")
}


class Text(NamedTuple):
    """A text, the images it belongs to, and where it stands: line of the jsonl, or key of the LMDB."""

    text_id: int | str
    text: str
    image_ids: list[int | str]
    number: int


@dataclass(frozen=True)
class Texts:
    """The texts of a split. The same id, in several records, stands for the same text.

    Attributes:
        path: the jsonl, or the `pairs` folder.
        unit: "line" or "key".
        records: one a line, or one a pair.
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
                    f"{self.where(text)}: text {text.text_id} is another one on {self.unit} {other.number}; ids must "
                    "differ"
                )

    def where(self, text: Text) -> str:
        return f"{self.path}, {self.unit} {text.number}"

    def answers(self, keys: Sequence[str], source: Path) -> Iterator[tuple[Text, int | str, int]]:
        """(record, image id, image index) for each image of each record, with the images' ids and where they are from.

        Raises UserError, naming the record, where an id is that of no image.
        """
        index_of = {key: index for index, key in enumerate(keys)}
        for text in self.records:
            for image_id in text.image_ids:
                index = index_of.get(str(image_id))
                if index is None:
                    raise UserError(
                        f"{self.where(text)}: there is no image {image_id} in {source}; both must be of the same split"
                    )
                yield text, image_id, index


@dataclass(frozen=True)
class Place:
    """Where a split is: an LMDB folder, or what the names of a tsv and a jsonl begin with."""

    path: Path
    is_lmdb: bool

    @property
    def images(self) -> Path:
        return self.path / "imgs" if self.is_lmdb else Path(f"{self.path}{IMAGES}")

    @property
    def texts(self) -> Path:
        return self.path / "pairs" if self.is_lmdb else Path(f"{self.path}{TEXTS}")


def read(options: DataOptions, split: str) -> RetrievalDataset | None:
    """Read one split; None where the data set has no such split."""
    named = {"train": options.train_data, "val": options.val_data}.get(split)
    if named:
        place = find_named_place(Path(named), split)
        if place is None:
            option = f"--{split}_data"
            raise UserError(
                f"{option} {named}: neither an LMDB folder (with imgs/ and pairs/) nor the beginning of the names of "
                f"a ...{IMAGES} and a ...{TEXTS}"
            )
    else:
        place = _place_in_root(options, split)
    if place is None:
        return None
    images = open_images(place.images)
    texts = read_lmdb_texts(place.path) if place.is_lmdb else read_texts(place.texts)
    return _dataset(options.name, split, images, texts)


def find_named_place(path: Path, split: str) -> Place | None:
    """The place that `path` names: an LMDB folder, a tsv or jsonl, their common prefix, or a folder of splits."""
    if (path / "imgs").is_dir():
        return Place(path, True)
    for ending in (IMAGES, TEXTS):
        if path.name.endswith(ending):
            path = path.with_name(path.name.removesuffix(ending))
    prefix = Place(path, False)
    if prefix.images.is_file() or prefix.texts.is_file():
        return prefix
    return _place_below(path, split)


def _place_below(root: Path, split: str) -> Place | None:
    """The split's LMDB folder, or else its tsv and jsonl, below the folder of a data set."""
    lmdbs = (Place(root / "lmdb" / name, True) for name in NAMES[split])
    prefixes = (Place(root / name, False) for name in NAMES[split])
    found = next((place for place in lmdbs if place.path.is_dir()), None)
    return found or next((place for place in prefixes if place.images.is_file() or place.texts.is_file()), None)


def _place_in_root(options: DataOptions, split: str) -> Place | None:
    root = Path(options.dataset_root)
    if place := _place_below(root, split):
        return place
    if options.train_data or options.val_data:
        return None  # the root need not be there at all
    check_root(root)
    if not any(_place_below(root, other) for other in NAMES):
        raise UserError(
            f"{root}: holds neither lmdb/{{train,valid,test}} nor {{train,valid,test}}{IMAGES} and ...{TEXTS}; give "
            "the folder of the data set as --dataset_root, or its parts as --train_data and --val_data"
        )
    return None


def open_images(path: Path) -> Base64Images:
    """The images of a `{split}_imgs.tsv` or of an LMDB's `imgs` folder."""
    return LmdbImages(path) if path.is_dir() else TsvImages(path)


def read_texts(path: Path) -> Texts:
    """Read a `{split}_texts.jsonl`. Raises UserError, naming file and line, where a line is something else."""
    texts = [_text(record, number, f"{path}, line {number}") for number, record in read_records(path)]
    if not texts:
        raise UserError(f"{path}: holds no texts")
    return Texts(path, "line", texts)


def _text(record: Any, number: int, where: str) -> Text:
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object, but a {type(record).__name__}")
    text_id, text, image_ids = (record.get(name) for name in ("text_id", "text", "image_ids"))
    if not is_id(text_id):
        raise UserError(f'{where}: no "text_id" that is a whole number or a text')
    if type(text) in (int, float):  # Chinese-CLIP takes such texts as well
        text = str(text)
    if not isinstance(text, str):
        raise UserError(f'{where}: no "text"')
    image_ids = [] if image_ids is None else image_ids
    if not isinstance(image_ids, list) or not all(map(is_id, image_ids)):
        raise UserError(f'{where}: "image_ids" is not a list of whole numbers or texts')
    return Text(text_id, mend_characters(text), image_ids, number)


def read_lmdb_texts(folder: Path) -> Texts:
    """Read the texts of an LMDB folder, a record for each pair.

    Chinese-CLIP keeps no text without an image there. Where it kept no text at all, as of a test set without answers,
    the texts are those of the jsonl beside the folder `lmdb`.
    """
    pairs = folder / "pairs"
    found = ((key, {"text_id": of, "text": text, "image_ids": [image]}) for key, (image, of, text) in read_pairs(pairs))
    texts = [_text(record, key, f"{pairs}, key {key}") for key, record in found]
    for number, record in enumerate(read_texts_without_image(pairs), len(texts)):
        texts.append(_text(record, number, f"{pairs}, text {number}"))
    if not texts:
        beside = folder.parent.parent / f"{folder.name}{TEXTS}"
        if not beside.is_file():
            raise UserError(f"{pairs}: holds no texts, nor is there a {beside} with texts that no image answers")
        return read_texts(beside)
    return Texts(pairs, "key", texts)


def _dataset(name: str, split: str, images: Base64Images, texts: Texts) -> RetrievalDataset:
    caption_of: dict[int | str, int] = {}
    captions: list[str] = []
    for text in texts.records:
        if caption_of.setdefault(text.text_id, len(captions)) == len(captions):
            captions.append(clean_caption(text.text))
    pairs = [(image, caption_of[text.text_id]) for text, _, image in texts.answers(images.keys, images.path)]
    image_ids = infer_id_types(images.keys, (image_id for text in texts.records for image_id in text.image_ids))
    return RetrievalDataset(name, split, images, captions, np.array(pairs, np.int64), image_ids, list(caption_of))
