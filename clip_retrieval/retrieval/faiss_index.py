"""Approximate nearest items with a compressed FAISS index, for galleries larger than memory.

The index takes one byte per number; .npy features stay on disk. The index proposes several times k items per query. The
proposals of a few hundred queries are read from disk, and `nearest` ranks them exactly: the order is exact, but items
that the index does not propose are missing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.neighbours import nearest
from clip_retrieval.evaluation.scores import Features
from clip_retrieval.retrieval.features import FeatureFile

CHUNK = 2**16  # items to add at a time
QUERIES = 256  # queries to search at a time
LISTS_FROM = 50_000  # items from which the index is split into lists; a query then searches some of them
TRAIN_ITEMS = 64  # training items per list


def approximate_nearest(queries: FeatureFile, items: FeatureFile, k: int) -> np.ndarray:
    """Find the item rows (queries, k), best first. Raises UserError if faiss is not installed."""
    k = min(k, len(items.vectors))
    index = build_index(items, "--index faiss")
    rows = np.empty((len(queries.vectors), k), np.int64)
    for start in range(0, len(rows), QUERIES):
        vectors = _read_float32(queries, slice(start, start + QUERIES))
        proposals = propose(index, vectors, k)
        neighbours = nearest(
            Features(vectors, torch.device("cpu"), "query", str),
            Features(items.vectors[proposals], torch.device("cpu"), "item", str),
            k,
            directions=["i2t"],
        )
        rows[start : start + QUERIES] = proposals[neighbours["i2t"].items]
    return rows


def build_index(items: FeatureFile, option: str) -> Any:
    """Build the index in memory. Raises UserError, naming the `option` that asked for it, if faiss is not installed."""
    try:
        import faiss
    except ImportError:
        raise UserError(f"{option}: faiss is not installed; pip install faiss-cpu") from None
    count, dim = items.vectors.shape
    lists = int(4 * count**0.5) if count >= LISTS_FROM else 0
    index: Any = faiss.index_factory(dim, f"IVF{lists},SQ8" if lists else "SQ8", faiss.METRIC_INNER_PRODUCT)
    if lists:
        index.nprobe = choose_probes(lists)
    sample = np.random.default_rng(0).permutation(count)[: max(CHUNK, TRAIN_ITEMS * lists)]
    index.train(_read_float32(items, np.sort(sample)))
    for start in range(0, count, CHUNK):
        index.add(_read_float32(items, slice(start, start + CHUNK)))
    return index


def choose_probes(lists: int) -> int:
    """The number of lists that a query searches."""
    return max(16, lists // 16)


def propose(index: Any, queries: np.ndarray, k: int) -> np.ndarray:
    """Propose items for the top k of float32 queries (queries, dim): distinct rows, at least k if there are as many."""
    k = min(k, index.ntotal)
    proposals = np.unique(index.search(queries, min(index.ntotal, max(4 * k, 100)))[1])
    proposals = proposals[proposals >= 0]  # -1: the searched lists hold too few items
    return proposals if len(proposals) >= k else np.union1d(proposals, np.arange(k))


def _read_float32(features: FeatureFile, rows: slice | np.ndarray) -> np.ndarray:
    vectors = np.ascontiguousarray(features.vectors[rows], np.float32)
    if not np.isfinite(vectors).all():
        raise UserError(f"{features.path}: a feature is not finite and cannot be scored")
    return vectors
