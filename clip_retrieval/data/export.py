"""Any data set, written as Chinese-CLIP's `{split}_imgs.tsv` and `{split}_texts.jsonl`."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from clip_retrieval.data.base64_images import typed_ids
from clip_retrieval.data.catalog import read_dataset
from clip_retrieval.data.dataset import UNSPLIT, EncodedImages, Images, RetrievalDataset
from clip_retrieval.data.decode import limit_image_pixels
from clip_retrieval.data.mixture import MixedImages
from clip_retrieval.data.readers.chinese import IMAGES, TEXTS
from clip_retrieval.data.readers.files import SPLITS
from clip_retrieval.errors import UserError
from clip_retrieval.options import DataOptions
from clip_retrieval.reporting.log import log, progress_bar

CHINESE_CLIP_SPLITS = ("train", "valid", "test")


def export(options: DataOptions, output: Path, splits: Sequence[str] = (), ids: str = "number") -> None:
    """Write the splits of a data set to `output` as tsv and jsonl files; see `export_each`."""
    export_each(options, output, splits, lambda dataset, name: export_split(dataset, output, name, ids))


def export_each(
    options: DataOptions, output: Path, splits: Sequence[str], write: Callable[[RetrievalDataset, str], None]
) -> None:
    """Write the splits of a data set to `output`; without `splits`, those that it has, as train, valid and test.

    A data set that has no splits is written as train, or as whatever it is asked for as.

    Args:
        options: the data set.
        output: folder that they are written to; made if need be.
        splits: what they are called there.
        write: writes one split under a name.

    Raises:
        UserError: there is no such split, an image cannot be read, or the folder cannot be written.
    """
    for name in splits:
        if name not in SPLITS:
            raise UserError(f"--splits {name}: no such split; choose from {', '.join(SPLITS)}")
    limit_image_pixels(options.max_image_pixels)
    written = 0
    for name in splits or CHINESE_CLIP_SPLITS:
        dataset = read_dataset(options, SPLITS[name])
        if dataset is None:
            if splits:
                raise UserError(f"{options.name} in {options.place} has no {name} split; take it out of --splits")
            continue
        try:
            output.mkdir(parents=True, exist_ok=True)
            write(dataset, name)
        except OSError as error:
            raise UserError(f"--output {output}: cannot be written ({error.strerror}); choose another folder") from None
        written += 1
        if not splits and dataset.split == UNSPLIT:
            break
    if not written:
        raise UserError(f"{options.name} in {options.place} has no split; give other data")


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
    with whole(output / f"{name}{IMAGES}") as path, _text(path) as tsv:
        for index in progress_bar(range(len(image_ids)), desc=f"{name}{IMAGES}"):
            encoded = base64.b64encode(file_bytes(dataset.images, index)).decode()
            tsv.write(f"{image_ids[index]}\t{encoded}\n")
    text_ids = dataset.text_ids or range(len(dataset.captions))
    with whole(output / f"{name}{TEXTS}") as path, _text(path) as jsonl:
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


def file_bytes(images: Images, index: int) -> bytes:
    """The bytes of an image's file; a picture that is no file becomes PNG."""
    if isinstance(images, MixedImages):
        return file_bytes(*images.find(index))
    if isinstance(images, EncodedImages):
        return images.encoded(index)
    file = io.BytesIO()
    images[index].save(file, "png")
    return file.getvalue()


def _text(path: Path) -> TextIO:
    return path.open("w", encoding="utf-8", newline="\n")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write a file that gets its name when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
