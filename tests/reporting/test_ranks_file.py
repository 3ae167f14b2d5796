"""ranks.npz: read back unchanged, readable by numpy alone, and refused with one line if it is damaged."""

import io
import pickle
import zipfile

import numpy as np
import pytest

from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.ranks import retrieval_ranks
from clip_retrieval.reporting.ranks_file import KINDS, read_ranks, write_ranks


@pytest.fixture
def written(tmp_path):
    rng = np.random.default_rng(0)
    pairs = np.array([[0, 1], [0, 2], [2, 0], [3, 0]])
    images = ImageFiles(["a.jpg", "b.jpg", "猫 \udcff.jpg", "d.jpg"])
    dataset = RetrievalDataset("photos", "test", images, list("xyz"), pairs, text_ids=[70, 80, "90"])
    ranks = retrieval_ranks(rng.normal(size=(4, 5)), rng.normal(size=(3, 5)), pairs)
    write_ranks(tmp_path / "ranks.npz", dataset, *ranks)
    return tmp_path / "ranks.npz", ranks


def test_read_back_unchanged(written):
    path, ranks = written
    found = read_ranks(path)
    for expected, direction in zip(ranks, ("i2t", "t2i")):
        for name, values in vars(expected).items():
            np.testing.assert_array_equal(getattr(found.ranks[direction], name), values)
    assert found.ids["i2t"].tolist() == ["a.jpg", "猫 \udcff.jpg", "d.jpg"]
    assert found.ids["t2i"].tolist() == ["70", "80", "90"]
    assert found.first_image.tolist() == [2, 0, 0]


def test_long_ids_stay_distinct_in_a_small_file(tmp_path):
    pairs = np.stack([np.arange(50), np.arange(50)], axis=1)
    images = ImageFiles([f"{row}.jpg" for row in range(50)])
    ids = ["x" * 10**5 + str(row) for row in range(50)]
    dataset = RetrievalDataset("photos", "test", images, ["a"] * 50, pairs, text_ids=ids)
    features = np.random.default_rng(0).normal(size=(50, 4))
    write_ranks(tmp_path / "ranks.npz", dataset, *retrieval_ranks(features, features, pairs))
    assert (tmp_path / "ranks.npz").stat().st_size < 10**6
    assert len(set(read_ranks(tmp_path / "ranks.npz").ids["t2i"].tolist())) == 50


def test_numpy_reads_it_without_pickles(written):
    with np.load(written[0], allow_pickle=False) as arrays:
        assert set(arrays) == set(KINDS)
        assert arrays["i2t_ids"].dtype.kind == "U" and arrays["i2t_above"].dtype == np.int64


def without(arrays, name):
    return {key: value for key, value in arrays.items() if key != name}


@pytest.mark.parametrize(
    ("damage", "message"),
    {
        "an array is missing": (lambda a: without(a, "t2i_above"), "t2i_above"),
        "sizes differ": (lambda a: a | {"i2t_tied": a["i2t_tied"][1:]}, "i2t arrays"),
        "ranks below 0": (lambda a: a | {"i2t_above": a["i2t_above"] - 9}, "i2t arrays"),
        "ranks beyond float64": (lambda a: a | {"i2t_tied": a["i2t_tied"] + 2**62}, "i2t arrays"),
        "no positives": (lambda a: a | {"t2i_positives": 0 * a["t2i_positives"]}, "t2i arrays"),
        "queries out of order": (
            lambda a: a | {"t2i_queries": a["t2i_queries"][::-1]},
            "t2i_queries must be ascending",
        ),
        "a query twice": (lambda a: a | {"i2t_queries": 0 * a["i2t_queries"]}, "i2t_queries must be ascending"),
        "fewer texts": (lambda a: a | {"t2i_texts": a["t2i_texts"][1:]}, "t2i arrays"),
        "unsigned": (lambda a: a | {"i2t_tied": a["i2t_tied"].astype(np.uint64)}, "holds uint64, not signed integers"),
        "no queries": (lambda a: {key: value[:0] for key, value in a.items()}, "i2t arrays"),
        "floats": (lambda a: a | {"i2t_above": a["i2t_above"] + 0.5}, "i2t_above"),
        "a pickle": (lambda a: a | {"i2t_ids": a["i2t_ids"].astype(object)}, "i2t_ids"),
        "invalid characters": (lambda a: a | {"i2t_ids": np.full(3, 2**31, "u4").view("U1")}, "i2t_ids.*characters"),
        "a matrix": (lambda a: a | {"i2t_ids": a["i2t_ids"][:, None]}, "shape"),
    }.values(),
)
def test_wrong_arrays_are_refused(written, damage, message):
    path, _ = written
    with np.load(path) as arrays:
        arrays = damage(dict(arrays))
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=message) as error:
        read_ranks(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_files_are_refused(written, tmp_path):
    path, _ = written
    content = path.read_bytes()
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<i8", "fortran_order": False, "shape": (2**50,)})
    with np.load(path) as arrays:
        np.savez_compressed(tmp_path / "compressed.npz", **arrays)
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as file:
        file.writestr("i2t_above.npy", huge.getvalue())
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "flipped.npz").write_bytes(content.replace(b"a\0\0\0.", b"b\0\0\0."))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps([1]))
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("compressed", "huge", "cut", "flipped", "pickle", "empty", "missing"):
        with pytest.raises(UserError, match=f"{name}.npz") as error:
            read_ranks(tmp_path / f"{name}.npz")
        assert "\n" not in str(error.value)
