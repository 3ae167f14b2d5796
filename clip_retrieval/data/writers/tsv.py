"""Export of any data set to Chinese-CLIP's `{split}_imgs.tsv` and `{split}_texts.jsonl`."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from clip_retrieval.data.catalog import read_dataset
from clip_retrieval.data.dataset import SPLITS, UNSPLIT, EncodedImages, Images, RetrievalDataset
from clip_retrieval.data.images.base64_images import infer_id_types
from clip_retrieval.data.images.decode import limit_image_pixels
from clip_retrieval.data.mixture import MixedImages
from clip_retrieval.data.readers.chinese import IMAGES, TEXTS
from clip_retrieval.errors import UserError, format_counts
from clip_retrieval.files import to_json, write_atomic
from clip_retrieval.log import log, progress_bar
from clip_retrieval.options import DataOptions

CHINESE_CLIP_SPLITS = ("train", "valid", "test")


def export(options: DataOptions, output: Path, splits: Sequence[str] = (), ids: str = "number") -> None:
    """Write the splits of a data set to `output` as tsv and jsonl files; see `export_each`."""
    export_each(options, output, splits, lambda dataset, name: export_split(dataset, output, name, ids))


def export_each(
    options: DataOptions, output: Path, splits: Sequence[str], write: Callable[[RetrievalDataset, str], None]
) -> None:
    """Write the splits of a data set to `output`.

    Args:
        options: the data set.
        output: the folder to write to; created if it is missing.
        splits: names of the splits, in the data set and in the files; by default train, valid and test as far as they
            exist. A data set without splits is written as train, or under the names in `splits`.
        write: function that writes one split under a name.

    Raises:
        UserError: a split is missing, an image cannot be read, or the folder cannot be written.
    """
    # check the options
    for name in splits:
        if name not in SPLITS:
            raise UserError(f"--splits {name}: no such split; choose from {', '.join(SPLITS)}")
    limit_image_pixels(options.max_image_pixels)

    # write each split
    count = 0
    for name in splits or CHINESE_CLIP_SPLITS:
        dataset = read_dataset(options, SPLITS[name])
        if dataset is None:
            if splits:
                raise UserError(f"{options.name} in {options.place} has no {name} split; remove it from --splits")
            continue
        try:
            output.mkdir(parents=True, exist_ok=True)
            write(dataset, name)
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise UserError(f"--output {output}: cannot be written ({error.strerror}); choose another folder") from None
        count += 1
        if not splits and dataset.split == UNSPLIT:
            break
    if not count:
        raise UserError(f"{options.name} in {options.place} has no split; give other data")


def export_split(dataset: RetrievalDataset, output: Path, name: str, ids: str = "number") -> None:
    """Write `output`/{name}_imgs.tsv and {name}_texts.jsonl.

    Images keep the bytes of their files; images without a file become PNG. Ids are those of the data set; if it has
    none, texts get their number in the split, images too, or with ids="name" the name of the file without its ending.
    """
    image_ids = _choose_image_ids(dataset, ids)
    images: list[list[int | str]] = [[] for _ in dataset.captions]
    for image, caption in dataset.pairs.tolist():
        images[caption].append(image_ids[image])
    with write_atomic(output / f"{name}{IMAGES}") as tsv:
        for index in progress_bar(range(len(image_ids)), desc=f"{name}{IMAGES}"):
            tsv.write(f"{image_ids[index]}\t".encode())
            tsv.write(base64.b64encode(read_image_bytes(dataset.images, index)) + b"\n")
    text_ids = dataset.text_ids or range(len(dataset.captions))
    with write_atomic(output / f"{name}{TEXTS}") as jsonl:
        for text_id, text, answers in zip(text_ids, dataset.captions, images):
            jsonl.write(to_json({"text_id": text_id, "text": text, "image_ids": answers}) + b"\n")
    log.info(f"{output / name}{IMAGES} and {TEXTS}: {format_counts(image=len(image_ids), text=len(dataset.captions))}")


def _choose_image_ids(dataset: RetrievalDataset, ids: str) -> Sequence[int | str]:
    """Return the ids to write. Raises UserError if two images have the same one."""
    images = dataset.images
    if dataset.image_ids is None and ids == "number":
        return range(len(images))
    names = dataset.image_ids or [Path(images.name(index)).stem for index in range(len(images))]
    rows: dict[str, int] = {}
    for row, image_id in enumerate(map(_format_id, names)):
        if (first := rows.setdefault(image_id, row)) != row:
            remedy = ", or use --ids number" if dataset.image_ids is None else ""
            raise UserError(
                f"{images.name(row)} and {images.name(first)} have the same name, {image_id}; rename one{remedy}"
            )
    return infer_id_types(list(rows), () if dataset.image_ids is None else dataset.image_ids)


def _format_id(image_id: int | str) -> str:
    """Return the id without tabs and line breaks, and with escapes for bytes that are not UTF-8."""
    return " ".join(str(image_id).split()).encode(errors="backslashreplace").decode()


def read_image_bytes(images: Images, index: int) -> bytes:
    """Return the bytes of an image file; an image without a file becomes PNG."""
    if isinstance(images, MixedImages):
        return read_image_bytes(*images.find(index))
    if isinstance(images, EncodedImages):
        return images.encoded(index)
    file = io.BytesIO()
    images[index].save(file, "png")
    return file.getvalue()
