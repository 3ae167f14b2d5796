"""The built-in data set: reproducible, without duplicate scenes."""

import numpy as np
import pytest

from clip_retrieval.data.readers import shapes
from clip_retrieval.options import DataOptions


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("shapes")


def read(root, split):
    return shapes.read(DataOptions(dataset="shapes", dataset_root=str(root)), split)


def test_sizes_and_five_captions_each(root):
    test = read(root, "test")
    assert (len(test.images), len(test.captions)) == (500, 2500)
    assert test.images[0].size == (64, 64)
    assert (np.bincount(test.pairs[:, 0]) == 5).all()
    assert all(len(set(test.captions[i : i + 5])) == 5 for i in range(0, 2500, 5))


def test_scenes_are_unique():
    scenes = shapes._make_scenes()
    assert len(scenes) == len(set(scenes)) == 5000


def test_captions_describe_the_scene():
    first, second = shapes.Thing("star", "red", "large"), shapes.Thing("ring", "cyan", "small")
    for axis, forward, backward in (("beside", "left of", "right of"), ("stacked", "above", "below")):
        captions = shapes.make_captions(shapes.Scene(first, second, axis), np.random.default_rng(0))
        for caption in captions:
            assert "red" in caption and "star" in caption and "cyan ring" in caption
            assert (forward if caption.index("star") < caption.index("ring") else backward) in caption


def test_the_image_has_its_colours_in_place():
    first, second = shapes.Thing("circle", "red", "large"), shapes.Thing("square", "blue", "large")
    pixels = shapes.draw(shapes.Scene(first, second, "beside"), np.random.default_rng(0))
    is_red, is_blue = ((pixels == shapes.COLOURS[c]).all(axis=2) for c in ("red", "blue"))
    assert is_red.sum() > 200 and is_blue.sum() > 200
    assert np.nonzero(is_red)[1].mean() < 32 < np.nonzero(is_blue)[1].mean()


def test_images_are_cached_and_reproducible(root, tmp_path):
    cached = read(root, "val").images.pixels
    (file,) = (path for path in (root / "shapes").iterdir() if path.name.startswith("val"))
    assert isinstance(read(root, "val").images.pixels, np.memmap)
    assert np.array_equal(read(tmp_path, "val").images.pixels, cached)
    file.write_bytes(file.read_bytes()[:1000])  # incomplete: drawn again
    assert np.array_equal(read(root, "val").images.pixels, cached)
