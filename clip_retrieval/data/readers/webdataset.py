"""Reader of tar shards as a data set: captions in memory, images read from their offsets in the shards on access.

It reads val and test splits, and train splits of a mixture; a single train split is a stream (`data.shards.stream`).
Samples without an image or a caption are skipped, with a warning; samples with the same image, byte for byte, are one
image with the captions of all of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.duplicates import merge_duplicates
from clip_retrieval.data.images.tar_members import ShardImages
from clip_retrieval.data.shards.find import find_shards
from clip_retrieval.data.shards.samples import (
    Member,
    Unusable,
    caption_ending,
    image_ending,
    read_captions,
    read_members,
)
from clip_retrieval.errors import UserError
from clip_retrieval.files import open_regular
from clip_retrieval.log import log, progress_bar
from clip_retrieval.options import DatasetOptions


def read(options: DatasetOptions, split: str) -> RetrievalDataset | None:
    """Read one split; None if it has no shards."""
    # read captions and places of the images
    found = find_shards(options, split)
    if found is None:
        return None
    places = array("q")
    keys: list[str] = []
    members: list[str] = []
    captions: list[list[str]] = []
    skipped: list[str] = []
    for shard, path in enumerate(progress_bar(found.paths, desc=f"{options.name} {split}", leave=False)):
        for sample in _read_samples(path, options.caption_key):
            if isinstance(sample, str):
                skipped.append(sample)
                continue
            captions.append(sample.captions)
            places.extend((shard, sample.image.begin, sample.image.size))
            keys.append(sample.image.key)
            members.append(f"{sample.image.key}.{sample.image.ending}")
    if not keys:
        raise UserError(skipped[0] if skipped else f"{found.paths[0]}: holds no images with captions")
    if skipped:
        log.warning(f"{len(skipped):,} of {len(keys) + len(skipped):,} samples are skipped; {skipped[0]}")

    # merge duplicate images
    images = ShardImages(found.paths, np.array(places).reshape(-1, 3), members)
    description = f"{options.name} {split}"
    firsts, texts, pairs = merge_duplicates(
        images.encoded, np.arange(len(images)), images.places[:, 2], captions, description
    )
    images = ShardImages(found.paths, images.places[firsts], [members[first] for first in firsts])
    ids = [keys[first] for first in firsts]
    return RetrievalDataset(options.name, found.split, images, texts, pairs, ids if len(set(ids)) == len(ids) else None)


class _Sample(NamedTuple):
    image: Member
    captions: list[str]


def _read_samples(path: Path, caption_key: str | None) -> Iterator[_Sample | str]:
    """Yield the samples of a shard; for an unusable one, its name and the problem."""
    try:
        with open_regular(path) as file:
            for members in read_members(path):
                # the first of two members of the same name counts
                by_ending = {member.ending: member for member in reversed(members)}
                try:
                    image = by_ending[image_ending(by_ending)]
                    text = by_ending[caption_ending(by_ending, caption_key)]
                    file.seek(text.begin)
                    yield _Sample(image, read_captions(file.read(text.size), text.ending, caption_key))
                except Unusable as problem:
                    yield f"{path}, sample {members[0].key}: {problem}"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
