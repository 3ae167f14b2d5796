"""Reader of a CSV or TSV: a column of image paths, one of captions, optionally one of splits.

Without a split column all rows are the train split and all rows are the test split for `--eval`; there is no val
split. An image path in several rows is one image. A duplicate caption of the same image counts once; the same caption
of different images is several captions, each a query of its own, as in COCO. A caption cell may hold a list of texts,
in JSON or as Python or numpy print it.
"""

from __future__ import annotations

import ast
import csv
import functools
import io
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_retrieval.data.captions import SURROGATES, clean_caption
from clip_retrieval.data.dataset import SPLITS, UNSPLIT, RetrievalDataset
from clip_retrieval.data.images.image_files import common_spelling, find_image_files
from clip_retrieval.data.negatives import clean_negatives
from clip_retrieval.data.readers.annotations import find_only_file
from clip_retrieval.errors import UserError, format_counts
from clip_retrieval.files import read_text
from clip_retrieval.options import DatasetOptions

DELIMITERS = ",;\t|"
_SEPARATOR_LINE = re.compile(r"""\s*"?sep=(\t|[^\w\s"'])"?[ \t]*(?:\r\n?|\n)""", re.IGNORECASE)  # written for Excel
# The texts of a list in a cell, and missing values. Nothing else is evaluated.
_ITEM = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|None|null|nan"""
_TEXT = re.compile(_ITEM, re.DOTALL)
_TEXT_LIST = re.compile(rf"\[\s*(?:(?:{_ITEM})[\s,]*)*\]", re.DOTALL)


class Row(NamedTuple):
    image: str
    caption: str
    split: str | None  # None if there is no split column
    line: int
    negative: str | None = None  # None if there is no column of negative captions


def read(options: DatasetOptions, split: str) -> RetrievalDataset | None:
    """Read one split; None if the file has no such split."""
    if options.annotations:
        path = Path(options.annotations)
    else:
        path = find_only_file(Path(options.dataset_root), ["*.csv", "*.tsv"])
    columns = (options.image_column, options.caption_column, options.split_column, options.negative_column)
    rows, has_splits = _read_rows(path, *columns)
    if has_splits:
        rows = [row for row in rows if row.split == split]
    if not rows or (split == "val" and not has_splits):
        return None
    folder = Path(options.image_dir) if options.image_dir else path.parent
    images: dict[str, int] = {}
    names: list[str] = []
    captions: dict[tuple[int, str], list[str]] = {}  # and the negative captions of each
    for row in rows:
        name = _shorten_name(row.image, folder)
        image = images.setdefault(common_spelling(name), len(images))
        if image == len(names):
            names.append(name)
        for caption, wrong in _read_captions(path, row):
            captions.setdefault((image, caption), []).extend(wrong)
    owners, texts = zip(*captions)
    negatives = None
    if options.negative_column and split == "train":
        negatives = clean_negatives(path, options.negative_column, texts, owners, list(captions.values()))
    found = find_image_files([(folder, names)], path, skip_missing=options.skip_broken)
    pairs = np.stack([owners, np.arange(len(owners))], axis=1)
    name = split if has_splits else UNSPLIT
    return RetrievalDataset(options.name, name, found, list(texts), pairs, negatives=negatives)


def _read_captions(path: Path, row: Row) -> list[tuple[str, list[str]]]:
    """Read the captions of a row, with the negative captions of each. Raises UserError if they do not fit."""
    captions, negatives = _read_cell(row.caption), _read_cell(row.negative) if row.negative else []
    if len(captions) == 1 or not negatives:
        return [(caption, negatives) for caption in captions]
    if len(captions) != len(negatives):
        raise UserError(
            f"{path}, line {row.line}: {format_counts(caption=len(captions))} and {len(negatives)} negative ones; give "
            "one for each caption, or a row for each caption"
        )
    return [(caption, [negative]) for caption, negative in zip(captions, negatives)]


def _shorten_name(name: str, folder: Path) -> str:
    """Return one name for an image in the folder of the images: a.jpg for ./a.jpg and /FOLDER/a.jpg."""
    name = os.path.normpath(name)
    if not Path(name).is_absolute():
        return name
    inside = os.path.relpath(name, folder)
    return name if inside.startswith(os.pardir) else inside


@functools.lru_cache(maxsize=1)
def _read_rows(
    path: Path, image_column: str, caption_column: str, split_column: str, negative_column: str | None
) -> tuple[list[Row], bool]:
    """Read all rows, with our names of splits, and whether there is a split column."""
    # A split column that the user names must exist.
    required = split_column != DatasetOptions.split_column
    rows = []
    for row in read_table(path, (image_column,), (caption_column,), split_column, required, negative_column):
        if not row.image:
            raise UserError(f"{path}, line {row.line}: column {image_column} is empty; fill it in or delete the line")
        split = row.split
        if row.split is not None and (split := SPLITS.get(row.split.lower())) is None:
            raise UserError(f"{path}, line {row.line}: split {row.split!r} is not one of {', '.join(SPLITS)}")
        rows.append(row._replace(split=split))
    if not rows:
        raise UserError(f"{path}: holds no captions")
    return rows, rows[0].split is not None


def _read_cell(cell: str) -> list[str]:
    """Read the caption in a cell, or the captions of a list: JSON, or as Python or numpy print it.

    An empty cell, list or item is an empty caption.
    """
    if not (cell.startswith("[") and _TEXT_LIST.fullmatch(cell)):
        return [clean_caption(cell)]
    try:
        texts = json.loads(cell, strict=False)
    except ValueError:
        # each text by itself: numpy prints no commas, and Python would join neighbours
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of unknown escapes
                texts = [ast.literal_eval(text) for text in _TEXT.findall(cell) if text[-1] in "'\""]
        except (SyntaxError, ValueError):
            return [clean_caption(cell)]
    return [clean_caption(text or "") for text in texts] or [""]


def read_table(
    path: Path,
    image_columns: Sequence[str],
    caption_columns: Sequence[str],
    split_column: str | None = None,
    split_required: bool = False,
    negative_column: str | None = None,
) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV with a header; cells are stripped, empty lines skipped.

    Args:
        path: the file.
        image_columns: names of the image column; the first one in the header counts.
        caption_columns: the same for the caption column.
        split_column: name of the split column.
        split_required: whether the split column must exist.
        negative_column: name of the column of negative captions, if there is one.

    Raises:
        UserError: a column is missing, or, naming the line, a row has another number of columns than the header.
    """
    # choose the delimiter
    text = read_text(path, errors="surrogateescape")  # image names may have bytes that are not UTF-8
    separator = _SEPARATOR_LINE.match(text)
    header_line = re.split(r"[\r\n]", text[separator.end() if separator else 0 :].lstrip(), maxsplit=1)[0]
    delimiter = separator[1] if separator else _choose_delimiter(path, header_line, image_columns, caption_columns)

    # strict: a stray quote is an error; otherwise it would swallow the lines up to the next quote.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    rows = ([cell.strip() for cell in cells] for cells in reader)
    rows = (cells for cells in rows if any(cells))
    if separator:
        next(rows, None)
    try:
        # find the columns in the header
        header = next(rows, [])
        image = _find_column(path, header, image_columns, "image_column")
        caption = _find_column(path, header, caption_columns, "caption_column")
        split = None
        if split_column and (split_required or split_column in header):
            split = _find_column(path, header, (split_column,), "split_column")

        negative = header.index(negative_column) if negative_column in header else None

        # yield the rows
        for row in rows:
            if not (cells := _fit_cells(row, len(header), caption, delimiter)):
                raise UserError(
                    f"{path}, line {reader.line_num}: not the {len(header)} columns of the header; put a caption that "
                    f"holds a {delimiter!r} in double quotes"
                )
            if broken := SURROGATES.search("".join(cells[:image] + cells[image + 1 :])):
                raise UserError(
                    f"{path}, line {reader.line_num}: not UTF-8 text (byte 0x{ord(broken[0]) & 0xFF:02x}); save it as "
                    "UTF-8"
                )
            splits, negatives = (None if column is None else cells[column] for column in (split, negative))
            yield Row(cells[image], cells[caption], splits, reader.line_num, negatives)
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: not well-formed ({error}); close every double quote, and write one "
            "within a quoted caption twice"
        ) from None


def _choose_delimiter(path: Path, header: str, image_columns: Sequence[str], caption_columns: Sequence[str]) -> str:
    """Return a tab for a .tsv, else the delimiter that yields the columns, else the most frequent one."""
    if path.name.endswith((".tsv", ".tsv.gz")):
        return "\t"
    for delimiter in DELIMITERS:
        columns = {name.strip(' "\r') for name in header.split(delimiter)}
        if not columns.isdisjoint(image_columns) and not columns.isdisjoint(caption_columns):
            return delimiter
    return max(DELIMITERS, key=header.count)


def _find_column(path: Path, header: list[str], names: Sequence[str], option: str) -> int:
    for name in names:
        if name in header:
            return header.index(name)
    found = ", ".join(header) or "none"
    raise UserError(
        f"{path}: no column {' or '.join(names)} (columns found: {found}); name it with --dataset csv and --{option}"
    )


def _fit_cells(cells: list[str], columns: int, caption: int, delimiter: str) -> list[str] | None:
    """Return the cells as a row of `columns` cells, or None if they do not fit."""
    end = len(cells)
    while end > columns and not cells[end - 1]:
        end -= 1
    cells = cells[:end]
    if len(cells) > columns == 2 and caption == 1:
        # An unquoted comma in the last of two columns belongs to the caption.
        space = " " if delimiter == "," else ""
        cells = [cells[0], (delimiter + space).join(cells[1:])]
    return cells if len(cells) == columns else None
