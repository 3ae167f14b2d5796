"""Any data set, written as Chinese-CLIP's `{split}_imgs.tsv` and `{split}_texts.jsonl`."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from clip_retrieval.data.base64_images import Base64Images, typed_ids
from clip_retrieval.data.catalog import read_dataset
from clip_retrieval.data.dataset import UNSPLIT, Images, RetrievalDataset
from clip_retrieval.data.images import ImageFiles
from clip_retrieval.data.readers.chinese import IMAGES, TEXTS
from clip_retrieval.data.readers.files import SPLITS
from clip_retrieval.errors import UserError
from clip_retrieval.options import DataOptions
from clip_retrieval.reporting.log import log, progress_bar

CHINESE_CLIP_SPLITS = ("train", "valid", "test")


def export(options: DataOptions, output: Path, splits: Sequence[str] = (), ids: str = "number") -> None:
    """Write the splits of a data set to `output`; without `splits`, those that it has, as train, valid and test.

    A data set that has no splits is written as train, or as whatever it is asked for as.

    Raises UserError where there is no such split, an image cannot be read, or the folder cannot be written.
    """
    for name in splits:
        if name not in SPLITS:
            raise UserError(f"--splits {name}: no such split; choose from {', '.join(SPLITS)}")
    written = 0
    for name in splits or CHINESE_CLIP_SPLITS:
        dataset = read_dataset(options, SPLITS[name])
        if dataset is None:
            if splits:
                raise UserError(f"{options.dataset} in {options.place} has no {name} split; take it out of --splits")
            continue
        try:
            output.mkdir(parents=True, exist_ok=True)
            export_split(dataset, output, name, ids)
        except OSError as error:
            raise UserError(f"--output {output}: cannot be written ({error.strerror}); choose another folder") from None
        written += 1
        if not splits and dataset.split == UNSPLIT:
            break
    if not written:
        raise UserError(f"{options.dataset} in {options.place} has no split; give other data")


def export_split(dataset: RetrievalDataset, output: Path, name: str, ids: str = "number") -> None:
    """Write `output`/{name}_imgs.tsv and {name}_texts.jsonl.

    Images are the bytes of their files, not encoded again; pictures that are no files become PNG. Each has the id that
    the data set gives it; else its number in the split, or with ids "name" the name of its file without the ending.
    Texts have the data set's ids, or their numbers.
    """
    image_ids = _image_ids(dataset, ids)
    images: list[list[int | str]] = [[] for _ in dataset.captions]
    for image, caption in dataset.pairs.tolist():
        images[caption].append(image_ids[image])
    with _whole(output / f"{name}{IMAGES}") as tsv:
        for index in progress_bar(range(len(image_ids)), desc=f"{name}{IMAGES}"):
            encoded = base64.b64encode(_file_bytes(dataset.images, index)).decode()
            tsv.write(f"{image_ids[index]}\t{encoded}\n")
    text_ids = dataset.text_ids or range(len(dataset.captions))
    with _whole(output / f"{name}{TEXTS}") as jsonl:
        for text_id, text, answers in zip(text_ids, dataset.captions, images):
            record = {"text_id": text_id, "text": text, "image_ids": answers}
            jsonl.write(json.dumps(record, ensure_ascii=False) + "\n")
    log.info(f"{output / name}{IMAGES} and {TEXTS}: {len(image_ids):,} images, {len(dataset.captions):,} texts")


def _image_ids(dataset: RetrievalDataset, ids: str) -> Sequence[int | str]:
    if dataset.image_ids is not None:
        return dataset.image_ids
    if ids == "number":
        return range(len(dataset.images))
    stems: dict[str, str] = {}
    for index in range(len(dataset.images)):
        path = dataset.images.name(index)
        stem = " ".join(Path(path).stem.split())  # an id holds no tab
        if (other := stems.setdefault(stem, path)) != path:
            raise UserError(
                f"{path} and {other} have the same name, which --ids name needs to differ; use --ids number"
            )
    return typed_ids(list(stems))


def _file_bytes(images: Images, index: int) -> bytes:
    if isinstance(images, (ImageFiles, Base64Images)):
        return images.encoded(index)
    file = io.BytesIO()
    images[index].save(file, "png")
    return file.getvalue()


@contextmanager
def _whole(path: Path) -> Iterator[TextIO]:
    """A text file that gets its name when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
