"""Negative captions: texts that almost describe an image, but are wrong (NegCLIP, Yuksekgonul et al. 2023,
arXiv:2210.01936)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clip_retrieval.data.captions import clean_caption, normalize_caption
from clip_retrieval.errors import format_share
from clip_retrieval.log import log


@dataclass(frozen=True)
class Negatives:
    """The negative captions of each caption.

    Attributes:
        texts: all of them.
        first: int64 (captions + 1,): those of caption i are `texts[first[i] : first[i + 1]]`.
    """

    texts: Sequence[str]
    first: np.ndarray

    @classmethod
    def from_lists(cls, lists: Iterable[Sequence[str]]) -> Negatives:
        """Make them from a list for each caption."""
        lists = list(lists)
        return cls([text for texts in lists for text in texts], np.cumsum([0, *map(len, lists)]))

    def lists(self) -> list[Sequence[str]]:
        """Return a list for each caption."""
        return [self.texts[a:b] for a, b in zip(self.first[:-1].tolist(), self.first[1:].tolist())]

    def draw(self, captions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw a text of each caption, int64 (n,): its index in `texts`, or -1 for a caption without one."""
        first, count = self.first[captions], self.first[captions + 1] - self.first[captions]
        return np.where(count > 0, first + (rng.random(len(captions)) * count).astype(np.int64), -1)


def clean_negatives(
    path: Path, name: str, captions: Sequence[str], owners: Sequence[int], found: Sequence[Sequence[str]]
) -> Negatives | None:
    """Clean the negative captions of a file; leave out empty ones, and those that are a caption of the image.

    Returns None if there are none: another data set of a mixture may have them.

    Args:
        path: the file, for messages.
        name: the column or key that holds them.
        captions: the captions.
        owners: the image of each caption.
        found: the negative captions of each caption.
    """
    true = {(owner, normalize_caption(caption)) for owner, caption in zip(owners, captions, strict=True)}
    given, kept = 0, []
    for owner, texts in zip(owners, found, strict=True):
        clean = [text for text in map(clean_caption, texts) if text]
        kept.append([text for text in clean if (owner, normalize_caption(text)) not in true])
        given += len(clean)
    negatives = Negatives.from_lists(kept)
    if wrong := given - len(negatives.texts):
        share = format_share(wrong, given, "negative caption")
        log.warning(f"{path}: {share} left out: equal to a caption of the image")
    if not negatives.texts:
        log.warning(f"{path}: no negative caption in {name}")
        return None
    if without := sum(not texts for texts in kept):
        log.warning(f"{path}: {format_share(without, len(kept), 'caption')} without a negative caption")
    return negatives
