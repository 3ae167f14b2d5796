"""Duplicate images, byte for byte: merged into one image with the captions of all of them.

Tables and shards often have a row, or a sample, for each caption, and repeat the image in each of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from clip_retrieval.log import progress_bar

PROBE_BYTES = 1024  # from the middle of images of equal size, compared before all bytes

Read = Callable[[int, slice], bytes | memoryview]
"""read(row, part) returns a slice of the bytes of the image in a row."""


def image_key(content: bytes) -> int:
    """Return a 64-bit hash of an image file."""
    return int.from_bytes(_digest(content)[:8], "little", signed=True)


def merge_duplicates(
    read: Read, rows: np.ndarray, sizes: np.ndarray, captions: Sequence[Sequence[str]], description: str
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Merge rows with the same image, in the order of their first rows.

    Args:
        read: reads the bytes of an image.
        rows: int64 (n,), the rows.
        sizes: int64 (n,), bytes of the image in each row.
        captions: the captions of each row, (n,).
        description: label of the progress bar.

    Returns:
        int64 (images,), the first position in `rows` of each image; the captions, without duplicates within an image;
        int64 (pairs, 2), image index and caption index.
    """
    first = find_duplicates(read, rows, sizes, description)
    firsts, image_of_row = np.unique(first, return_inverse=True)
    numbers: dict[tuple[int, str], int] = {}
    for image, texts in zip(image_of_row.tolist(), captions, strict=True):
        for text in texts:
            numbers.setdefault((image, text), len(numbers))
    pairs = np.array([(image, number) for (image, _), number in numbers.items()], dtype=np.int64)
    return firsts, [text for _, text in numbers], pairs.reshape(-1, 2)


def find_duplicates(read: Read, rows: np.ndarray, sizes: np.ndarray, description: str) -> np.ndarray:
    """Find for each row the position of the first row with the same bytes, int64 (rows,).

    Rows of equal size are compared by a probe first; all bytes are read only if the probes are equal. See
    `merge_duplicates` for the arguments.
    """
    group = np.unique(sizes, return_inverse=True)[1]
    for stage, longest in (("probe", PROBE_BYTES), ("whole", int(sizes.max(initial=0)))):
        # split each group of several rows by the digests of the selected bytes
        candidates = np.flatnonzero(np.bincount(group)[group] > 1)
        keys = np.empty(len(candidates), dtype=[("group", np.int64), ("digest", "S16")])
        bar = progress_bar(candidates.tolist(), desc=f"{description}, {stage}", leave=False)
        for number, position in enumerate(bar):
            begin = max(0, int(sizes[position]) - longest) // 2
            keys[number] = group[position], _digest(read(int(rows[position]), slice(begin, begin + longest)))
        refined = group.copy()
        refined[candidates] = len(group) + np.unique(keys, return_inverse=True)[1]
        group = np.unique(refined, return_inverse=True)[1]
    first = np.unique(group, return_index=True)[1]
    return first[group]


def _digest(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
