"""Decode images to find the missing and broken ones, in parallel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from clip_retrieval.data.dataset import Images
from clip_retrieval.data.workers import map_in_workers
from clip_retrieval.errors import UserError
from clip_retrieval.log import progress_bar

IMAGES_PER_REQUEST = 16


def find_broken_images(
    images: Images, rows: Sequence[int], *, num_workers: int, description: str
) -> Iterator[tuple[int, str]]:
    """Yield (index, problem) of the images that are missing or cannot be decoded, in order.

    Args:
        images: the images.
        rows: the indices of the images to decode.
        num_workers: processes that decode.
        description: label of the progress bar.
    """
    requests = [rows[start : start + IMAGES_PER_REQUEST] for start in range(0, len(rows), IMAGES_PER_REQUEST)]
    with progress_bar(total=len(rows), desc=description, unit="images", leave=False) as bar:
        results = map_in_workers(partial(_find_problems, images), requests, num_workers=num_workers)
        for request, found in zip(requests, results, strict=True):
            yield from found
            bar.update(len(request))


def _find_problems(images: Images, indices: Sequence[int]) -> list[tuple[int, str]]:
    """Return (index, problem) of the images that cannot be decoded."""
    found = []
    for index in indices:
        try:
            images[index]
        except UserError as error:
            found.append((index, str(error)))
    return found
