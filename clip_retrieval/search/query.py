"""Search an index for photographs.

python scripts/search.py "a dog on the beach" PHOTOS

The score of a photograph is the mean of its cosines with the texts and images of the query, minus the mean of its
cosines with the negative texts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_retrieval.data.images.decode import decode_rgb
from clip_retrieval.data.images.photographs import prepare_photo
from clip_retrieval.errors import UserError, printable
from clip_retrieval.evaluation.scores import rounding_bound
from clip_retrieval.files import to_json
from clip_retrieval.log import log, start_log
from clip_retrieval.search.approximate import Propose, is_wanted, open_faiss
from clip_retrieval.search.encoder import Encoder
from clip_retrieval.search.index import open_index
from clip_retrieval.search.source import choose_source

BLOCK = 2**12  # features to convert to float64 at a time


@dataclass(frozen=True)
class Request:
    """A query of the command line.

    Attributes:
        text: a text.
        images: image files.
        negative: negative texts.
        top_k: number of photographs to find.
        json: print JSON.
        faiss: see `approximate.is_wanted`.
    """

    text: str = ""
    images: tuple[Path, ...] = ()
    negative: tuple[str, ...] = ()
    top_k: int = 10
    json: bool = False
    faiss: bool = False

    def __post_init__(self) -> None:
        if not self.text.strip() and not self.images:
            raise UserError("nothing to search for: give a text or --image, and the folder")
        if self.top_k < 1:
            raise UserError(f"--top_k {self.top_k}: must be at least 1")


def combine(positives: np.ndarray, negatives: np.ndarray | None = None) -> np.ndarray:
    """Return the query, float32 (dim,): the mean of positives (n, dim) minus the mean of negatives (m, dim).

    Both are L2-normalised features.
    """
    query = positives.astype(np.float64).mean(0)
    if negatives is not None and len(negatives):
        query -= negatives.astype(np.float64).mean(0)
    return query.astype(np.float32)


def top_k(features: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows of the k highest inner products in float64; of equal ones, the first rows.

    A float32 product selects the candidates: its error is within `rounding_bound`.

    Args:
        features: float32 (rows, dim), L2-normalised.
        query: float32 (dim,).

    Returns:
        int64 (k,) rows and float64 (k,) inner products, best first; fewer if there are fewer rows.

    Raises UserError if a feature is not finite.
    """
    k = min(k, len(features))
    if k == 0:
        return np.empty(0, np.int64), np.empty(0)
    with np.errstate(all="ignore"):  # of features that are not finite
        fast = features @ query
    if not np.isfinite(fast).all():
        raise UserError("the index holds features that are not finite; build it again with --overwrite")
    margin = 1.01 * rounding_bound(len(query))[0] * float(np.linalg.norm(query.astype(np.float64)))
    low = float(np.partition(fast, len(fast) - k)[len(fast) - k]) - 2 * margin
    rows = np.flatnonzero(fast >= low)
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    exact = np.concatenate([(features[block].astype(np.float64) * query).sum(1) for block in blocks])
    order = np.argsort(-exact, kind="stable")[:k]
    return rows[order], exact[order]


class Gallery:
    """An index with its model, to search.

    Attributes:
        photos: the folder of the photographs.
        folder: the folder of the index.
        index: the index.
        entries: the readable files, in the order of the features.
        features: float32 (entries, dim), memory-mapped.
        encoder: the model.
    """

    def __init__(self, photos: Path, folder: Path, typed: dict[str, Any], encoder: Encoder | None = None):
        """Open the index and load its model, or the one in `typed`, unless it is given as `encoder`.

        Raises UserError if the index was made by another model.
        """
        self.photos = photos
        self.folder = folder
        self.index = open_index(folder, photos)
        self.features = self.index.features
        self.entries = self.index.entries
        self.encoder = encoder or Encoder(choose_source(typed, self.index.model), typed)
        self._propose: Propose | None = None
        if self.encoder.record["fingerprint"] != self.index.model["fingerprint"]:
            raise UserError(
                f"{folder}: the index was made by {self.index.model['name']} with other weights; give that "
                "checkpoint as --resume, or update the index with: search.py index --overwrite"
            )

    def reopen(self) -> Gallery:
        """Open the index as it is now, with the same model. Raises UserError as the constructor does."""
        return Gallery(self.photos, self.folder, {}, self.encoder)

    def accelerate(self, faiss: bool | None = None) -> None:
        """Search with FAISS from now on, if `approximate.is_wanted`. The file beside the index is made if needed."""
        if is_wanted(len(self.entries), faiss):
            self._propose = open_faiss(self.index.features_path, self.features)

    def path(self, row: int) -> Path:
        """The file of a row."""
        return self.photos / self.entries[row].name

    def encode_query(
        self,
        texts: Sequence[str] = (),
        images: Sequence[Image.Image] = (),
        rows: Sequence[int] = (),
        negatives: Sequence[str] = (),
    ) -> np.ndarray:
        """Encode a query of texts, images and rows of the index, and negative texts: float32 (dim,)."""
        positives = [self.features[list(rows)]] if rows else []
        if texts:
            positives.append(self.encoder.encode_texts(texts).numpy())
        if images:
            positives.append(self.encoder.encode_photos(images).numpy())
        return combine(np.concatenate(positives), self.encoder.encode_texts(negatives).numpy() if negatives else None)

    def search(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the top k, see `top_k`: of all, or of those that FAISS proposes."""
        if self._propose is None:
            return top_k(self.features, query, k)
        rows = self._propose(query, k)
        best, scores = top_k(self.features[rows], query, k)
        return rows[best], scores


def run_query(photos: Path, folder: Path, typed: dict[str, Any], request: Request) -> None:
    """Search an index, and print the photographs with the highest scores."""
    start_log()
    log.setLevel(logging.WARNING)  # standard output is for the results
    for path in request.images:
        if not path.exists():
            raise UserError(f"--image {path}: no such file; give the path of an image")
    images = [decode_rgb(str(path), str(path), prepare_photo) for path in request.images]
    gallery = Gallery(photos, folder, typed)
    texts = [request.text] if request.text.strip() else []
    negatives = [text for text in request.negative if text.strip()]  # as the page does
    query = gallery.encode_query(texts, images, negatives=negatives)
    gallery.accelerate(request.faiss)
    rows, scores = gallery.search(query, request.top_k)
    found = [(score, gallery.entries[row]) for row, score in zip(rows.tolist(), scores.tolist())]
    if not request.json:
        for score, entry in found:
            shown = printable(str(photos / entry.name)).replace("\n", "\\n")
            print(f"{score:7.4f}  {shown}")
        return
    results = [
        {"score": score, "name": entry.name, "path": str((photos / entry.name).absolute())} for score, entry in found
    ]
    print(to_json({"photos": str(photos.absolute()), "results": results}, indent=2).decode())
