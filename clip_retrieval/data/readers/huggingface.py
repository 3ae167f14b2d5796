"""Reader of Hugging Face data sets, and simple-clip's: a Dataset or a DatasetDict saved by `save_to_disk`.

    DATA/dataset_dict.json, DATA/train/, DATA/validation/, DATA/test/     a DatasetDict: splits
    DATA/state.json, DATA/data-00000-of-00004.arrow                       a Dataset: all of it is the train split

A row holds an image (see `data.images.arrow_columns`) and its caption or a list of captions; rows without one of them
are skipped, with a warning. Rows with the same image, byte for byte, are one image with the captions of all of them.

    huggingface     --image_column, --caption_column
    sbucaptions     {root}/sbu_captions_images, or the root itself: image, caption
    textcap         {root}/textcap, or the root itself: image_base64_str, outputs (M3IT's), or image, caption
    combined        the mixture of {root}/coco, {root}/textcap and {root}/sbu_captions_images
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clip_retrieval.data.captions import clean_caption
from clip_retrieval.data.dataset import SPLITS, UNSPLIT, Images, RetrievalDataset
from clip_retrieval.data.images.arrow_columns import ArrowImages, Contents, is_saved_dataset, is_text, open_columns
from clip_retrieval.data.images.duplicates import merge_duplicates
from clip_retrieval.data.images.image_files import find_image_files
from clip_retrieval.data.mixture import read_mixture
from clip_retrieval.errors import UserError, describe, format_share
from clip_retrieval.files import check_root, read_json
from clip_retrieval.log import log, progress_bar
from clip_retrieval.options import DatasetOptions

SPLITS_FILE = "dataset_dict.json"
# simple-clip's folders.
FOLDERS = {"coco": "coco", "textcap": "textcap", "sbucaptions": "sbu_captions_images"}
# Columns of the named data sets: renamed, or M3IT's own.
IMAGE_COLUMNS, CAPTION_COLUMNS = ("image", "image_base64_str"), ("caption", "outputs")


def read(options: DatasetOptions, split: str) -> RetrievalDataset | None:
    """Read one split; None if the data set has no such split."""
    root = Path(options.dataset_root)
    check_root(root)
    if options.name == "combined":
        parts = [replace(options, dataset=(name,), dataset_root=str(root / folder)) for name, folder in FOLDERS.items()]
        return read_mixture("combined", parts, split, _read_saved)
    folder = FOLDERS.get(options.name)
    if folder and (root / folder).is_dir():
        options = replace(options, dataset_root=str(root / folder))
    return _read_saved(options, split)


def _read_saved(options: DatasetOptions, split: str) -> RetrievalDataset | None:
    """Read one split of the data set that was saved in dataset_root."""
    root = Path(options.dataset_root)
    check_root(root)
    if is_saved_dataset(root):
        return None if split == "val" else _build_dataset(options, UNSPLIT, root)
    if not (root / SPLITS_FILE).is_file():
        raise UserError(
            f"{root}: holds neither {SPLITS_FILE} nor state.json; give a folder that save_to_disk of a Hugging Face "
            "data set wrote as --dataset_root"
        )
    names = _read_split_names(root / SPLITS_FILE)
    if split not in names:
        return None
    return _build_dataset(options, split, root / names[split])


def _read_split_names(path: Path) -> dict[str, str]:
    """Read the folder name of each split."""
    content = read_json(path)
    found = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UserError(f'{path}: no list "splits"; save the data set again')
    names = {SPLITS[name]: name for name in found if name in SPLITS}
    if not names:
        raise UserError(f"{path}: none of its splits ({', '.join(found)}) is one of {', '.join(SPLITS)}")
    return names


def _build_dataset(options: DatasetOptions, split: str, folder: Path) -> RetrievalDataset:
    # open the columns
    table = open_columns(folder)
    image_column = _find_column(options, "image_column", IMAGE_COLUMNS, table, folder)
    caption_column = _find_column(options, "caption_column", CAPTION_COLUMNS, table, folder)
    captions = _read_captions(table.column(caption_column), f"{folder}, column {caption_column}")
    contents = _open_contents(table.column(image_column), f"{folder}, column {image_column}")

    # select the rows with an image and a caption
    description = f"{options.name} {split}"
    sizes = np.fromiter(
        (len(content) for content in progress_bar(contents, total=len(contents), desc=description, leave=False)),
        np.int64,
        count=len(contents),
    )
    has_caption = np.array([bool(texts) for texts in captions], dtype=bool)
    rows = np.flatnonzero((sizes > 0) & has_caption)
    if len(rows) == 0:
        raise UserError(f"{folder}: no row has one image in {image_column} and a caption in {caption_column}")
    if len(rows) < len(sizes):
        log.warning(
            f"{folder}: {format_share(len(sizes) - len(rows), len(sizes), 'row')} skipped: "
            f"{np.count_nonzero(sizes == 0):,} without one image, {np.count_nonzero(~has_caption):,} without a caption"
        )

    # merge duplicate images
    captions = [captions[row] for row in rows]
    firsts, texts, pairs = merge_duplicates(
        lambda row, part: contents[row][part], rows, sizes[rows], captions, description
    )
    images = _open_images(options, folder, image_column, contents, rows[firsts], sizes[rows[firsts]])
    return RetrievalDataset(options.name, split, images, texts, pairs)


def _find_column(options: DatasetOptions, option: str, known: Sequence[str], table: Any, folder: Path) -> str:
    """Find the column given by the option; for a named data set, else the first of the known ones."""
    chosen = getattr(options, option)
    known = (chosen,) if options.name == "huggingface" else tuple(dict.fromkeys((chosen, *known)))
    for name in known:
        if name in table.column_names:
            return name
    found = ", ".join(table.column_names) or "none"
    raise UserError(f"{folder}: no column {' or '.join(known)} (columns found: {found}); name it with --{option}")


def _read_captions(column: Any, place: str) -> list[list[str]]:
    """Read the captions of each row, without empty ones."""
    if not is_text(column.type):
        raise UserError(f"{place}: holds {column.type}, not texts; name another with --caption_column")
    try:
        column.validate(full=True)
        values = column.to_pylist()
    except (ValueError, OSError, MemoryError) as error:  # pyarrow's errors are these
        raise UserError(f"{place}: damaged ({describe(error)}); fetch the data set again") from None
    captions = []
    for value in values:
        texts = value if isinstance(value, list) else [value]
        captions.append([clean for text in texts if text and (clean := clean_caption(text))])
    return captions


def _open_contents(column: Any, place: str) -> Contents:
    """Open the bytes, base64 or path of the image in each row."""
    try:
        contents = Contents(column)
        if not any(len(content) for content in contents):
            return Contents(column, "path")
        return contents
    except TypeError as error:
        raise UserError(f"{place}: {error}, not images; name another with --image_column") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{place}: damaged ({describe(error)}); fetch the data set again") from None


def _open_images(
    options: DatasetOptions, folder: Path, column: str, contents: Contents, rows: np.ndarray, sizes: np.ndarray
) -> Images:
    if contents.field == "path" or (contents.is_text and b"." in bytes(contents[int(rows[0])])):  # base64 has no dot
        image_folder = options.image_dir or folder
        names = [str(contents[int(row)], "utf-8", "replace") for row in rows]
        return find_image_files([(image_folder, names)], folder, skip_missing=options.skip_broken)
    return ArrowImages(folder, column, contents, rows, sizes, is_base64=contents.is_text)
