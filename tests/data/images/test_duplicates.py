"""Rows with the same bytes."""

import numpy as np

from clip_retrieval.data.images.duplicates import PROBE_BYTES, find_duplicates, image_key, merge_duplicates


def test_duplicates_are_those_of_comparing_all_bytes():
    """Random contents, many of them equal, of equal size, or different in one byte, against brute force."""
    rng = np.random.default_rng(0)
    base = [bytes(rng.integers(0, 256, size, dtype=np.uint8)) for size in (1, 10, 5 * PROBE_BYTES, 5 * PROBE_BYTES)]
    changed = [content[:position] + b"?" + content[position + 1 :] for content in base for position in (0, -1)]
    contents = [memoryview([*base, *changed][i]) for i in rng.integers(0, 12, 60)]
    rows = np.flatnonzero(rng.random(60) < 0.8)
    sizes = np.array([len(contents[row]) for row in rows])
    found = find_duplicates(lambda row, part: contents[row][part], rows, sizes, "test")
    expected = [next(i for i, r in enumerate(rows) if contents[r] == contents[row]) for row in rows]
    assert found.tolist() == expected


def test_duplicates_are_merged_with_all_captions():
    contents = [b"dog", b"cat", b"dog", b"cow", b"dog"]
    captions = [["a dog", "an animal"], ["an animal"], ["a pet", "a dog"], ["a cow"], ["a dog"]]
    rows = np.array([0, 1, 2, 4])
    found = merge_duplicates(
        lambda row, part: contents[row][part], rows, np.full(4, 3), [captions[r] for r in rows], "test"
    )
    firsts, texts, pairs = found
    assert rows[firsts].tolist() == [0, 1]
    assert [(image, texts[caption]) for image, caption in pairs.tolist()] == [
        (0, "a dog"),
        (0, "an animal"),
        (1, "an animal"),
        (0, "a pet"),
    ]


def test_keys_depend_on_the_content_only():
    keys = {image_key(bytes([number % 256, number // 256])) for number in range(5000)}
    assert len(keys) == 5000 and all(-(2**63) <= key < 2**63 for key in keys)
    assert image_key(b"dog") == image_key(memoryview(b"a dog")[2:])
