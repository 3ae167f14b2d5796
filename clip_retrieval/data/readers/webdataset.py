"""Reader of tar shards as a data set: captions in memory, images read from their offsets in the shards on access.

It reads val and test splits, and train splits of a mixture; a single train split is a stream (`data.shards.stream`).
Samples without an image or a caption are skipped, with a warning; samples with the same image, byte for byte, are one
image with the captions of all of them. Images of remote and compressed shards are copied to a temporary file first.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.duplicates import merge_duplicates
from clip_retrieval.data.images.spool import Spool
from clip_retrieval.data.images.tar_members import ShardImages
from clip_retrieval.data.shards.find import find_shards
from clip_retrieval.data.shards.remote import Url
from clip_retrieval.data.shards.samples import (
    Member,
    SkipSample,
    caption_ending,
    image_ending,
    read_captions,
    read_members,
    read_sample_captions,
    read_samples,
)
from clip_retrieval.data.shards.sources import Place, is_forward
from clip_retrieval.errors import UserError, format_share
from clip_retrieval.files import explain_errors, open_regular
from clip_retrieval.log import log, progress_bar
from clip_retrieval.options import DatasetOptions


def read(options: DatasetOptions, split: str) -> RetrievalDataset | None:
    """Read one split; None if it has no shards."""
    # read captions and places of the images
    found = find_shards(options, split)
    if found is None:
        return None
    if split == "train" and any(isinstance(path, Url) for path in found.paths):
        raise UserError(
            f"--train_data {options.train_data}: remote train shards are only for the training of a single data set; "
            "copy them to this machine"
        )
    places = array("q")
    keys: list[str] = []
    members: list[str] = []
    captions: list[list[str]] = []
    skipped: list[str] = []
    files: list[Path] = []
    spool: Spool | None = None
    for shard, path in enumerate(progress_bar(found.paths, desc=f"{options.name} {split}", leave=False)):
        if isinstance(path, Url) or is_forward(path):
            spool = spool or Spool()
            files.append(spool.path)
            samples = _copy_samples(path, options.caption_key, spool)
        else:
            files.append(path)
            samples = _read_samples(path, options.caption_key)
        for sample in samples:
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
        log.warning(f"{format_share(len(skipped), len(keys) + len(skipped), 'sample')} skipped; {skipped[0]}")

    # merge duplicate images
    if spool:
        spool.finish()
    images = ShardImages(found.paths, np.array(places).reshape(-1, 3), members, files)
    description = f"{options.name} {split}"
    firsts, texts, pairs = merge_duplicates(
        images.encoded, np.arange(len(images)), images.places[:, 2], captions, description
    )
    images = ShardImages(found.paths, images.places[firsts], [members[first] for first in firsts], files)
    ids = [keys[first] for first in firsts]
    return RetrievalDataset(options.name, found.split, images, texts, pairs, ids if len(set(ids)) == len(ids) else None)


class _Sample(NamedTuple):
    image: Member
    captions: list[str]


def _copy_samples(path: Place, caption_key: str | None, spool: Spool) -> Iterator[_Sample | str]:
    """Yield the samples of a shard that is read from front to back, as `_read_samples` does; copy the images."""
    for sample in read_samples(path):
        key = sample["__key__"]
        try:
            ending, captions = image_ending(sample), read_sample_captions(sample, caption_key)
            content = sample[ending]
            yield _Sample(Member(key, ending, spool.add(content), len(content)), captions)
        except SkipSample as problem:
            yield f"{path}, sample {key}: {problem}"


def _read_samples(path: Path, caption_key: str | None) -> Iterator[_Sample | str]:
    """Yield the samples of a shard; for an unusable one, its name and the problem."""
    with explain_errors(path), open_regular(path) as file:
        for members in read_members(path):
            # the first of two members of the same name counts
            by_ending = {member.ending: member for member in reversed(members)}
            try:
                image = by_ending[image_ending(by_ending)]
                text = by_ending[caption_ending(by_ending, caption_key)]
                file.seek(text.begin)
                yield _Sample(image, read_captions(file.read(text.size), text.ending, caption_key))
            except SkipSample as problem:
                yield f"{path}, sample {members[0].key}: {problem}"
