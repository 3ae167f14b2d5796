"""The FAISS file beside an index: the same results after it is read, and built again if it is not of these features."""

import numpy as np
import pytest

from clip_retrieval.errors import UserError
from clip_retrieval.search import approximate as module
from clip_retrieval.search.approximate import faiss_path, is_current, is_wanted, open_faiss
from clip_retrieval.search.query import Gallery, top_k
from clip_retrieval.search.source import INDEX_FOLDER
from tests.search.conftest import paint

faiss_index = pytest.importorskip("clip_retrieval.retrieval.faiss_index")
pytest.importorskip("faiss")


@pytest.fixture
def features(tmp_path, monkeypatch):
    """(path, features) of an index that FAISS splits into lists."""
    monkeypatch.setattr(faiss_index, "LISTS_FROM", 500)
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((20, 16))
    values = (centers[rng.integers(20, size=900)] + rng.standard_normal((900, 16))).astype(np.float32)
    return tmp_path / "index-features-3.npy", values / np.linalg.norm(values, axis=1, keepdims=True)


def refuse_to_build(*args):
    raise AssertionError("built again")


def test_file_gives_the_results_of_the_index_that_was_built(features, monkeypatch):
    path, values = features
    built = open_faiss(path, values)
    assert faiss_path(path).name == "index-faiss-3.npz" and is_current(path, values)
    monkeypatch.setattr(module, "_build", refuse_to_build)
    read = open_faiss(path, values)
    found = 0
    for query in values[:50]:
        rows = read(query, 5)
        assert rows.tolist() == built(query, 5).tolist() and len(rows) < len(values)
        found += len(set(rows.tolist()) & set(top_k(values, query, 5)[0].tolist()))
    assert found > 240  # of 250


@pytest.mark.parametrize(
    "damage",
    {
        "other features": lambda a: a | {"hash": np.array(["0" * 32])},
        "rows beyond the features": lambda a: a | {"ids": a["ids"] + 1},
        "a row twice": lambda a: a | {"ids": 0 * a["ids"]},
        "negative sizes": lambda a: a | {"sizes": np.concatenate([[-1], [a["sizes"][:2].sum() + 1], a["sizes"][2:]])},
        "sizes that overflow": lambda a: a | {"sizes": a["sizes"] + 2**60},
        "no lists": lambda a: a | {"sizes": a["sizes"][:0], "centroids": a["centroids"][:0]},
        "fewer codes": lambda a: a | {"codes": a["codes"][1:]},
        "wide codes": lambda a: a | {"codes": a["codes"].astype(np.uint16)},
        "not finite": lambda a: a | {"centroids": a["centroids"] * np.float32(np.nan)},
        "an array is missing": lambda a: {name: value for name, value in a.items() if name != "ranges"},
    }.values(),
)
def test_file_that_does_not_fit_is_built_again(features, damage):
    path, values = features
    expected = open_faiss(path, values)(values[0], 5).tolist()
    with np.load(faiss_path(path)) as arrays:
        np.savez(faiss_path(path), **damage(dict(arrays)))
    assert open_faiss(path, values)(values[0], 5).tolist() == expected
    with np.load(faiss_path(path)) as arrays:
        assert arrays["ids"].max() == len(values) - 1 and arrays["codes"].dtype == np.uint8


def test_changed_features_and_a_broken_file_are_built_again(features):
    path, values = features
    open_faiss(path, values)
    assert not is_current(path, values[::-1]) and not is_current(path, values[:-1])
    faiss_path(path).write_bytes(b"IwFl" + bytes(100))  # the start of FAISS's own format
    assert not is_current(path, values) and open_faiss(path, values)(values[0], 1)[0] >= 0 and is_current(path, values)


def test_number_of_images_and_options_decide(monkeypatch):
    assert not is_wanted(0, True)  # an empty index
    assert [is_wanted(10**6, faiss) for faiss in (None, False, True)] == [True, False, True]
    assert [is_wanted(1000, faiss) for faiss in (None, False, True)] == [False, False, True]
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    assert not is_wanted(10**6, None)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        is_wanted(1000, True)


def test_index_keeps_the_file_of_its_features_only(index, photos, script, monkeypatch):
    monkeypatch.setattr(faiss_index, "LISTS_FROM", 2)
    folder = photos / INDEX_FOLDER
    for number in range(30):
        paint(photos / f"more {number}.png", 50 + number)
    assert index("--faiss")[0] == 0
    (first,) = folder.glob("index-faiss-*.npz")
    assert first == faiss_path(next(folder.glob("index-features-*.npy")))
    (photos / "0.jpg").unlink()
    monkeypatch.setattr(module, "APPROXIMATE_FROM", 3)  # by default from some number of images on
    assert index()[0] == 0
    (second,) = folder.glob("index-faiss-*.npz")
    assert second == faiss_path(next(folder.glob("index-features-*.npy"))) != first
    before = second.stat().st_mtime_ns
    assert index()[0] == 0 and second.stat().st_mtime_ns == before
    found = [script("search", "a house", photos, "--json", *option) for option in ((), ("--faiss",))]
    assert found[0][0] == 0 and found[0] == found[1]
    (photos / "1.jpg").unlink()
    assert index("--no_faiss")[0] == 0 and not list(folder.glob("*faiss*"))


def test_faiss_search_finds_the_exact_neighbours(indexed):
    gallery = Gallery(indexed, indexed / INDEX_FOLDER, {})
    query = gallery.encode_query(["a house"])
    exact = [found.tolist() for found in gallery.search(query, 3)]
    gallery.accelerate(True)
    assert [found.tolist() for found in gallery.search(query, 3)] == exact
