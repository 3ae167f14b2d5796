"""The data sets by name: their readers, their known sizes, and what kind of files they have."""

from __future__ import annotations

import difflib
import importlib
from glob import escape, glob
from typing import Any

from clip_retrieval.data.dataset import UNSPLIT, RetrievalDataset
from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.data.mixture import read_mixture
from clip_retrieval.data.selection import hold_out, without_empty_captions, without_images
from clip_retrieval.data.shards.remote import is_url
from clip_retrieval.errors import UserError, format_share
from clip_retrieval.log import log
from clip_retrieval.options import DataOptions, DatasetOptions, as_tuple

SHARDED = ("webdataset", "yfcc7m")
"""Data sets in tar shards."""
PACKED = (*SHARDED, "huggingface", "textcap", "sbucaptions", "combined")
"""Data sets whose images are packed together, so that a user cannot repair a single one."""

# Module of each data set in `readers`, imported on use.
READERS = {
    "coco": "coco",
    "flickr30k": "karpathy",
    "flickr8k": "karpathy",
    "karpathy": "karpathy",
    "csv": "csv_file",
    "chinese": "chinese",
    "huggingface": "huggingface",
    "sbucaptions": "huggingface",
    "textcap": "huggingface",
    "combined": "huggingface",
    "webdataset": "webdataset",
    "yfcc7m": "webdataset",
    "shapes": "shapes",
}

# (images, captions) of the splits of published numbers. COCO's id lists have five captions per image, Karpathy's JSON
# has all of them; train may lack restval.
KNOWN_SIZES = {
    ("coco", "train"): ((113_287, 566_435), (113_287, 566_747), (82_783, 413_915), (82_783, 414_113)),
    ("coco", "val"): ((5_000, 25_000), (5_000, 25_010)),
    ("coco", "test"): ((5_000, 25_000), (5_000, 25_010)),
    ("flickr30k", "train"): ((29_000, 145_000),),
    ("flickr30k", "val"): ((1_014, 5_070),),
    ("flickr30k", "test"): ((1_000, 5_000),),
    ("flickr8k", "train"): ((6_000, 30_000),),
    ("flickr8k", "val"): ((1_000, 5_000),),
    ("flickr8k", "test"): ((1_000, 5_000),),
}


def read_dataset(options: DataOptions, split: str) -> RetrievalDataset | None:
    """Read the "train", "val" or "test" split; None if the data set has no such split.

    Several data sets are read as a mixture: all train splits, and the val and test split of the first one that has it.
    Images are located, not opened. Raises UserError if a data set is unknown, or its files are missing or invalid.
    """
    parts = options.parts()
    if len(parts) > 1:
        return read_mixture(options.name, parts, split, _read_one)
    return _read_one(parts[0], split)


def check_name(name: str, option: str = "--dataset") -> None:
    """Raise UserError, naming the option and the nearest names, for an unknown data set."""
    if name not in READERS:
        near = difflib.get_close_matches(name.lower(), READERS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(READERS)}"
        raise UserError(f"{option} {name}: no such data set; {hint}")


def _read_one(options: DatasetOptions, split: str) -> RetrievalDataset | None:
    """Read a split of a single data set; hold it out of the train split if the options say so."""
    if not any(options.fractions.values()):
        return _read_usable(options, split)
    whole = _read_whole(options)
    if whole is None or (split != "train" and whole.split != UNSPLIT):
        own = _read_usable(options, split)
        if own is not None and options.fractions[split]:
            raise UserError(
                f"--{split}_fraction: {options.name} in {options.place} has a {split} split already; drop the option"
            )
        if whole is None or own is not None:
            return own
    if split != "train" and not options.fractions[split]:
        return None
    return hold_out(whole, split, options.fractions)


_whole: tuple[str, RetrievalDataset | None] = ("", None)


def _read_whole(options: DatasetOptions) -> RetrievalDataset | None:
    """Read the split of which others are held out, once for all of them."""
    global _whole
    if _whole[0] != repr(options):
        _whole = (repr(options), _read_usable(options, "train"))
    return _whole[1]


def _read_usable(options: DatasetOptions, split: str) -> RetrievalDataset | None:
    """Read a split without empty captions and, with --skip_broken, without missing images."""
    dataset = open_dataset(options, split)
    if dataset is None:
        return None
    if isinstance(dataset.images, ImageFiles) and (missing := dataset.images.missing):
        dataset = without_images(dataset, missing, f"missing: the first is {dataset.images.name(missing[0])}")
    dataset = without_empty_captions(dataset)
    count_broken(dataset)
    return dataset


def open_dataset(options: DatasetOptions, split: str) -> RetrievalDataset | None:
    """Read a split of a single data set as its reader does, with empty captions.

    Raises UserError if the data set is unknown, or its files are missing or invalid.
    """
    check_name(options.name)
    reader = importlib.import_module(f"clip_retrieval.data.readers.{READERS[options.name]}")
    return reader.read(options, split)


def count_broken(dataset: RetrievalDataset) -> None:
    """Warn of captions with U+FFFD, by which readers replace half surrogate pairs."""
    broken = sum("\ufffd" in caption for caption in dataset.captions if not caption.isascii())
    if broken:
        share = format_share(broken, len(dataset.captions), "caption")
        log.warning(f"{dataset.name} {dataset.split}: {share} damaged, with U+FFFD in place of broken characters")


def size_warning(dataset: RetrievalDataset) -> str | None:
    """Return a warning if a known data set has unusual sizes, else None."""
    known = KNOWN_SIZES.get((dataset.name, dataset.split))
    found = (len(dataset.images), len(dataset.captions))
    if known is None or found in known:
        return None
    usual = known[0]
    return (
        f"{dataset.name} {dataset.split}: {found[0]:,} images and {found[1]:,} captions instead of the usual "
        f"{usual[0]:,} and {usual[1]:,}; its results do not compare with published ones"
    )


def is_streamed(options: DataOptions) -> bool:
    """Whether the train split is read from shards, one sample after the other. A mixture is not."""
    return len(options.dataset) == 1 and options.dataset[0] in SHARDED


def skips_unreadable(options: DataOptions) -> bool:
    """Whether training skips unreadable images instead of stopping."""
    return options.skip_broken or any(name in PACKED for name in options.dataset)


def infer_dataset(given: dict[str, Any]) -> str | None:
    """Return the only data set that has the options given, so that --dataset need not be typed; None if none is."""
    tables = as_tuple(given.get("annotations"))
    if len(tables) == 1 and tables[0] and tables[0].lower().removesuffix(".gz").endswith((".csv", ".tsv")):
        return "csv"
    files = [file for name in ("train_data", "val_data") for file in as_tuple(given.get(name)) if file]
    if not files:
        return None
    names = [name for file in files for name in (file, *file.replace("::", " ").split())]
    tars = (".tar", ".tar.gz", ".tgz")
    sharded = any(name.endswith(tars) or is_url(name) or _holds_tars(name) for name in names)
    return "webdataset" if sharded else "chinese"


def _holds_tars(folder: str) -> bool:
    try:
        # (A Path's own glob fails on a text that is too long for a name.)
        return bool(glob(f"{escape(folder)}/*.tar"))  # noqa: PTH207
    except ValueError:  # no folder can have this name; `check_values` refuses it
        return False
