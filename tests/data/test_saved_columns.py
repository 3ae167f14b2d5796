"""Columns of a saved data set: which rows hold the same bytes. (What they hold: test_readers_huggingface.)"""

import numpy as np

from clip_retrieval.data.saved_columns import GLANCE, first_alike


def test_images_are_told_apart_by_their_last_byte_and_by_nothing_else():
    """Against the plain way: first_alike of random contents, many of them equal, of equal sizes, or nearly equal."""
    rng = np.random.default_rng(0)
    base = [bytes(rng.integers(0, 256, size, dtype=np.uint8)) for size in (1, 10, 5 * GLANCE, 5 * GLANCE)]
    changed = [content[:position] + b"?" + content[position + 1 :] for content in base for position in (0, -1)]
    contents = [memoryview([*base, *changed][i]) for i in rng.integers(0, 12, 60)]
    rows = np.flatnonzero(rng.random(60) < 0.8)
    sizes = np.array([len(contents[row]) for row in rows])
    found = first_alike(contents, rows, sizes, "test")
    plain = [next(i for i, r in enumerate(rows) if contents[r] == contents[row]) for row in rows]
    assert found.tolist() == plain
