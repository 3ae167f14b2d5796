"""Images that are the same, byte for byte: one image with the captions of all of them, wherever they stand.

Tables and shards often have a row, or a sample, for each caption, and its image in each of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from clip_retrieval.log import progress_bar

PROBE_BYTES = 1024  # bytes from the middle of two images, of the same size, that are compared before all of them

Read = Callable[[int, slice], bytes | memoryview]
"""read(row, part) gives these bytes of the image in a row."""


def image_key(content: bytes) -> int:
    """A number of 64 bits that images have in common if they are the same, and practically only then."""
    return int.from_bytes(_digest(content)[:8], "little", signed=True)


def merge_duplicates(
    read: Read, rows: np.ndarray, sizes: np.ndarray, captions: Sequence[Sequence[str]], description: str
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """One image for rows that hold the same one, numbered in the order of their first rows.

    Args:
        read: gives the bytes of the images.
        rows: int64 (n,), the rows that hold them.
        sizes: int64 (n,), their sizes in bytes.
        captions: the captions of each row, (n,).
        description: of the progress bar.

    Returns:
        int64 (images,), where in `rows` each image stands first; the captions, the same one of the same image once;
        int64 (pairs, 2), image and caption.
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
    """int64 (rows,): for each row the position of the first one that holds the same bytes.

    Only rows of equal size are looked at, a glance first; all of the bytes are read only of those that look the same.
    See `merge_duplicates` for the arguments.
    """
    group = np.unique(sizes, return_inverse=True)[1]
    for look in (_probe, _whole):
        alike = np.flatnonzero(np.bincount(group)[group] > 1)
        keys = np.empty(len(alike), dtype=[("group", np.int64), ("digest", "S16")])
        bar = progress_bar(alike.tolist(), desc=f"{description}, {look.__name__.strip('_')}", leave=False)
        for number, position in enumerate(bar):
            keys[number] = group[position], _digest(read(int(rows[position]), look(int(sizes[position]))))
        told_apart = group.copy()
        told_apart[alike] = len(group) + np.unique(keys, return_inverse=True)[1]
        group = np.unique(told_apart, return_inverse=True)[1]
    first = np.unique(group, return_index=True)[1]
    return first[group]


def _probe(size: int) -> slice:
    return slice(max(0, size // 2 - PROBE_BYTES // 2), min(size, size // 2 + PROBE_BYTES // 2))


def _whole(size: int) -> slice:
    return slice(0, size)


def _digest(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
