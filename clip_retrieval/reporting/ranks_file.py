"""ranks.npz: the rank of every query of an evaluation, with its id. numpy.load reads it without pickles.

For each direction ("i2t", "t2i"), arrays (queries,): `i2t_ids`, names of images and ids of captions; `i2t_above`,
`i2t_tied` and `i2t_positives`, see `Ranks`; `i2t_queries`, their indices in the split. `t2i_images` is the index of the
image with which the bootstrap draws each caption, and `t2i_texts` a hash of its text; older files lack it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clip_retrieval.arrays import read_npz
from clip_retrieval.errors import UserError
from clip_retrieval.files import write_atomic

if TYPE_CHECKING:  # it loads torch
    from clip_retrieval.data.dataset import RetrievalDataset
    from clip_retrieval.evaluation.ranks import Ranks

LONGEST_NAME = 1000  # characters of an id; a longer one is cut, with its hash
LARGEST = 2**53  # float64 has every whole number up to here
TEXTS = "t2i_texts"
COUNTS = ("above", "tied", "positives", "queries")
KINDS = {f"{direction}_{name}": "i" for direction in ("i2t", "t2i") for name in COUNTS}
KINDS |= {"i2t_ids": "U", "t2i_ids": "U", "t2i_images": "i", TEXTS: "i"}


@dataclass(frozen=True)
class RankedQueries:
    """The content of ranks.npz.

    Attributes:
        ids: {"i2t": names of the images, "t2i": ids of the captions}, text (queries,).
        ranks: {"i2t": Ranks, "t2i": Ranks}.
        first_image: int64 (t2i queries,), the image with which the bootstrap draws each caption.
        texts: int64 (t2i queries,), a hash of the text of each caption; None in older files.
    """

    ids: dict[str, np.ndarray]
    ranks: dict[str, Ranks]
    first_image: np.ndarray
    texts: np.ndarray | None = None


def write_ranks(path: Path, dataset: RetrievalDataset, i2t: Ranks, t2i: Ranks) -> None:
    """Write the ranks of a split atomically. Raises OSError."""
    from clip_retrieval.evaluation.bootstrap import first_images

    hashes = [_hash(dataset.captions[query]) for query in t2i.queries.tolist()]
    arrays = {"t2i_images": first_images(dataset.pairs, t2i.queries), TEXTS: np.array(hashes, np.int64)}
    for direction, ranks, name in (("i2t", i2t, dataset.images.name), ("t2i", t2i, dataset.caption_name)):
        names = [name(query) for query in ranks.queries.tolist()]
        # an array pads all texts to the longest; the ids of a data set may have any length
        names = [text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]} {_hash(text)}" for text in names]
        arrays[f"{direction}_ids"] = np.array(names, dtype=np.str_)
        arrays |= {f"{direction}_{count}": getattr(ranks, count) for count in COUNTS}
    with write_atomic(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_ranks(path: Path) -> RankedQueries:
    """Read a ranks.npz. Raises UserError, naming the file, if it is missing, damaged or something else."""
    from clip_retrieval.evaluation.ranks import Ranks

    arrays = read_npz(path, KINDS, optional=[TEXTS])
    texts = arrays.pop(TEXTS, None)
    if texts is not None and len(texts) != len(arrays["t2i_images"]):
        raise UserError(f"{path}: its t2i arrays do not belong together; write it again with --eval")
    for direction in ("i2t", "t2i"):
        own = {name: array for name, array in arrays.items() if name.startswith(direction)}
        ids, size = own.pop(f"{direction}_ids"), len(own[f"{direction}_above"])
        sizes_differ = size == 0 or any(len(array) != size for array in (ids, *own.values()))
        least = {name: int(name == f"{direction}_positives") for name in own}
        if sizes_differ or any(array.min() < least[name] or array.max() > LARGEST for name, array in own.items()):
            raise UserError(f"{path}: its {direction} arrays do not belong together; write it again with --eval")
        if (np.diff(own[f"{direction}_queries"]) <= 0).any():
            raise UserError(f"{path}: {direction}_queries must be ascending; write it again with --eval")
    return RankedQueries(
        {direction: arrays[f"{direction}_ids"] for direction in ("i2t", "t2i")},
        {
            direction: Ranks(*(arrays[f"{direction}_{count}"].astype(np.int64) for count in COUNTS))
            for direction in ("i2t", "t2i")
        },
        arrays["t2i_images"].astype(np.int64),
        None if texts is None else texts.astype(np.int64),
    )


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
