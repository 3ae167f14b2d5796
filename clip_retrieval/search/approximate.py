"""Approximate search of a large index with FAISS, and the file that keeps it beside the index.

    index-faiss-3.npz    for index-features-3.npy: the lists, their centroids and the compressed features

FAISS's own format is not read: a hostile file could crash its parser. The arrays of this one are checked, and another
one than that of the features (by a hash of some of them) is built again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clip_retrieval.arrays import read_npz
from clip_retrieval.errors import UserError, describe
from clip_retrieval.files import write_atomic
from clip_retrieval.log import log

APPROXIMATE_FROM = 500_000
"""Images from which exact search takes 0.1 s on two cores."""
SAMPLED = 1024  # features in the hash
ARRAYS = {"centroids": "f", "sizes": "i", "ids": "i", "codes": "u", "ranges": "f"}

Propose = Callable[[np.ndarray, int], np.ndarray]
"""propose(query, k) returns int64 rows, at least k, that may be among the top k."""


def is_wanted(images: int, faiss: bool | None) -> bool:
    """Whether to search approximately; faiss is None by default, and then the number of images decides.

    Raises UserError if `faiss` asks for it and it is not installed.
    """
    if faiss is False or images == 0 or (faiss is None and images < APPROXIMATE_FROM):
        return False
    try:
        import faiss as _  # noqa: F401
    except ImportError:
        if faiss:
            raise UserError("--faiss: faiss is not installed; pip install faiss-cpu") from None
        log.warning(f"{images:,} images are searched faster with FAISS: pip install faiss-cpu")
        return False
    return True


def faiss_path(features_path: Path) -> Path:
    """The file of FAISS for a file of features."""
    return features_path.with_name(features_path.name.replace("features", "faiss")).with_suffix(".npz")


def is_current(features_path: Path, features: np.ndarray) -> bool:
    """Whether the file belongs to these features. It may still be damaged."""
    try:
        return read_npz(faiss_path(features_path), {"hash": "U"})["hash"].tolist() == [_hash(features)]
    except UserError:
        return False


def open_faiss(features_path: Path, features: np.ndarray) -> Propose:
    """Read the file of FAISS, or else build the index and write the file. features: float32 (rows, dim)."""
    from clip_retrieval.retrieval.faiss_index import propose

    index: Any = None
    if is_current(features_path, features):
        try:
            index = _read(faiss_path(features_path), features.shape)
        except UserError as error:
            log.warning(f"{error}; it is built again")
    if index is None:
        index = _build(features_path, features)
    return lambda query, k: propose(index, query[None], k)


def _build(features_path: Path, features: np.ndarray) -> Any:
    from clip_retrieval.retrieval.faiss_index import build_index
    from clip_retrieval.retrieval.features import FeatureFile

    log.info(f"building the FAISS index of {len(features):,} images, which takes minutes for a million")
    index = build_index(FeatureFile(range(len(features)), features, features_path), "--faiss")
    if hasattr(index, "invlists"):  # a small index has no lists, and is built in seconds
        try:
            _write(faiss_path(features_path), index, _hash(features))
        except OSError as error:
            log.warning(f"{faiss_path(features_path)}: cannot be written ({describe(error)}); the next start builds it")
    return index


def _write(path: Path, index: Any, known: str) -> None:
    import faiss

    lists = index.invlists
    sizes = np.array([lists.list_size(number) for number in range(index.nlist)], np.int64)
    parts: list[list[np.ndarray]] = [[], []]
    for number, size in enumerate(sizes.tolist()):
        ids, codes = lists.get_ids(number), lists.get_codes(number)
        parts[0].append(faiss.rev_swig_ptr(ids, size).copy())
        parts[1].append(faiss.rev_swig_ptr(codes, size * index.code_size).copy())
    ids, codes = map(np.concatenate, parts)
    arrays = {"hash": np.array([known]), "sizes": sizes, "ids": ids, "codes": codes}
    arrays["centroids"] = index.quantizer.reconstruct_n(0, index.nlist).ravel()
    arrays["ranges"] = faiss.vector_to_array(index.sq.trained)
    with write_atomic(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _read(path: Path, shape: tuple[int, int]) -> Any:
    """Read the file for features of a shape (rows, dim). Raises UserError if it is damaged."""
    import faiss

    from clip_retrieval.retrieval.faiss_index import choose_probes

    # check the arrays: the compiled code relies on them
    rows, dim = shape
    arrays = read_npz(path, ARRAYS)
    sizes, ids, codes = arrays["sizes"].astype(np.int64), arrays["ids"].astype(np.int64), arrays["codes"]
    centroids, ranges = (arrays[name].astype(np.float32) for name in ("centroids", "ranges"))
    lengths = (len(centroids), len(ids), len(codes), len(ranges))
    valid = lengths == (len(sizes) * dim, rows, rows * dim, 2 * dim) and codes.dtype == np.uint8
    valid = valid and len(sizes) > 0 and bool(((sizes >= 0) & (sizes <= rows)).all()) and int(sizes.sum()) == rows
    valid = valid and bool(np.isfinite(centroids).all() and np.isfinite(ranges).all())
    if not valid or not np.array_equal(np.sort(ids), np.arange(rows)):
        raise UserError(f"{path}: not the FAISS index of these features")

    # make the index
    quantizer = faiss.IndexFlatIP(dim)
    quantizer.add(centroids.reshape(-1, dim))
    kind = faiss.ScalarQuantizer.QT_8bit
    index = faiss.IndexIVFScalarQuantizer(quantizer, dim, len(sizes), kind, faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(ranges, index.sq.trained)
    index.is_trained = True
    lists: Any = index.invlists
    ends = sizes.cumsum()
    for number, (start, end) in enumerate(zip((ends - sizes).tolist(), ends.tolist())):
        if end > start:
            own = np.ascontiguousarray(ids[start:end]), np.ascontiguousarray(codes[start * dim : end * dim])
            lists.add_entries(number, end - start, *map(faiss.swig_ptr, own))
    index.ntotal = rows
    index.nprobe = choose_probes(len(sizes))
    return index


def _hash(features: np.ndarray) -> str:
    """A hash of the shape and of some features."""
    known = hashlib.blake2b(repr(features.shape).encode(), digest_size=16)
    known.update(np.ascontiguousarray(features[:: max(1, len(features) // SAMPLED)]).data)
    return known.hexdigest()
