"""Nearest items through a compressed index of FAISS, for galleries that do not fit into the memory.

A gallery takes a byte a number in the index; .npy features stay on disk. The index proposes several times k items for
each query, what a few hundred queries are proposed is read from disk, and `nearest` ranks that exactly: what comes out
is in the right order, but an item that the index did not propose is missing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.neighbours import nearest
from clip_retrieval.evaluation.scores import Features
from clip_retrieval.retrieval.features import FeatureFile

CHUNK = 2**16  # items that are added at a time
QUERIES = 256  # queries that are searched at a time
LISTS_FROM = 50_000  # items from which the index has lists, and a query looks at some of them only
TRAINED_ON = 64  # items for each list


def approximate_nearest(queries: FeatureFile, items: FeatureFile, k: int) -> np.ndarray:
    """Item rows (queries, k), best first. Raises UserError where faiss is not installed."""
    faiss = _faiss()
    count, k = len(items.vectors), min(k, len(items.vectors))
    index = _build(faiss, items)
    rows = np.empty((len(queries.vectors), k), np.int64)
    for start in range(0, len(rows), QUERIES):
        vectors = _float32(queries, slice(start, start + QUERIES))
        proposed = np.unique(index.search(vectors, min(count, max(4 * k, 100)))[1])
        proposed = proposed[proposed >= 0]  # -1 where the lists that were looked at hold too few
        if len(proposed) < k:
            proposed = np.union1d(proposed, np.arange(k))
        found = nearest(
            Features(vectors, torch.device("cpu"), "query", str),
            Features(items.vectors[proposed], torch.device("cpu"), "item", str),
            k,
            directions=["i2t"],
        )
        rows[start : start + QUERIES] = proposed[found["i2t"].items]
    return rows


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("--index faiss needs faiss, which is not installed: pip install faiss-cpu") from None
    return faiss


def _build(faiss: Any, items: FeatureFile) -> Any:
    count, dim = items.vectors.shape
    lists = int(4 * count**0.5) if count >= LISTS_FROM else 0
    index = faiss.index_factory(dim, f"IVF{lists},SQ8" if lists else "SQ8", faiss.METRIC_INNER_PRODUCT)
    if lists:
        index.nprobe = max(16, lists // 16)
    sample = np.random.default_rng(0).permutation(count)[: max(CHUNK, TRAINED_ON * lists)]
    index.train(_float32(items, np.sort(sample)))
    for start in range(0, count, CHUNK):
        index.add(_float32(items, slice(start, start + CHUNK)))
    return index


def _float32(features: FeatureFile, rows: slice | np.ndarray) -> np.ndarray:
    vectors = np.ascontiguousarray(features.vectors[rows], np.float32)
    if not np.isfinite(vectors).all():
        raise UserError(f"{features.path}: a feature is not finite; nothing can be scored against it")
    return vectors
