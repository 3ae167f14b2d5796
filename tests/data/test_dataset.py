"""RetrievalDataset: sorted pairs, and positives against brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.errors import UserError


def dataset(images, captions, pairs):
    paths = [f"{i}.jpg" for i in range(images)]
    return RetrievalDataset("csv", "train", ImageFiles(paths), [f"caption {i}" for i in range(captions)], pairs)


@st.composite
def many_to_many(draw):
    images, captions = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    pair = st.tuples(st.integers(0, images - 1), st.integers(0, captions - 1))
    return images, captions, draw(st.lists(pair, min_size=1, max_size=30))


def test_pairs_are_unique_and_sorted():
    data = dataset(3, 3, np.array([[2, 1], [0, 2], [2, 1], [2, 0], [0, 0]]))
    assert data.pairs.dtype == np.int64
    assert data.pairs.tolist() == [[0, 0], [0, 2], [2, 0], [2, 1]]
    assert data.first_pair.tolist() == [0, 2, 2, 4]


@given(many_to_many())
def test_pairs_of_an_image(case):
    images, captions, pairs = case
    data = dataset(images, captions, np.array(pairs))
    assert [tuple(pair) for pair in data.pairs.tolist()] == sorted(set(pairs))
    for i in range(images):
        rows = data.pairs[data.first_pair[i] : data.first_pair[i + 1]]
        assert [tuple(pair) for pair in rows.tolist()] == sorted({pair for pair in pairs if pair[0] == i})


@given(many_to_many(), st.data())
def test_positives_are_the_pairs(case, draw):
    images, captions, pairs = case
    data = dataset(images, captions, np.array(pairs))
    batch = draw.draw(st.lists(st.integers(0, images - 1), max_size=12))
    texts = draw.draw(st.lists(st.integers(0, captions - 1), max_size=12))
    found = data.positives(np.array(batch, dtype=np.int64), np.array(texts, dtype=np.int64))
    relevant = set(pairs)
    expected = [(i, j) for i, image in enumerate(batch) for j, text in enumerate(texts) if (image, text) in relevant]
    assert found.dtype == np.int64 and found.shape == (len(expected), 2)
    assert sorted(map(tuple, found.tolist())) == expected


def test_a_data_set_without_pairs_cannot_be_scored():
    data = dataset(2, 2, np.empty((0, 2)))
    assert data.pairs.shape == (0, 2) and data.first_pair.tolist() == [0, 0, 0]
    assert len(data.positives(np.array([0, 1]), np.array([1]))) == 0
    with pytest.raises(UserError, match="csv, train split: no image has a caption"):
        data.require_pairs()
    dataset(1, 1, [[0, 0]]).require_pairs()


def test_ids_are_one_for_each_image_and_caption_or_none():
    images, pairs = ImageFiles(["a.jpg", "b.jpg"]), np.array([[0, 0]])
    data = RetrievalDataset("csv", "train", images, ["a"], pairs, image_ids=[7, "x"], text_ids=[1])
    assert (data.image_ids, data.text_ids) == ([7, "x"], [1])
    data = RetrievalDataset("csv", "train", images, ["a"], pairs)
    assert data.image_ids is None and data.text_ids is None
    for ids in ({"image_ids": [1]}, {"text_ids": [1, 2]}):
        with pytest.raises(ValueError, match="one id for each"):
            RetrievalDataset("csv", "train", images, ["a"], pairs, **ids)


@pytest.mark.parametrize("pair", [[2, 0], [0, 2], [-1, 0], [0, -1]])
def test_pairs_outside_are_a_bug(pair):
    with pytest.raises(ValueError, match="outside"):
        dataset(2, 2, np.array([pair]))
