"""Export of any data set to the tar shards that `--dataset webdataset` reads."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.decode import decode_rgb
from clip_retrieval.data.shards.samples import CAPTION
from clip_retrieval.data.shards.sizes import SIZES, read_sizes
from clip_retrieval.data.writers.tsv import export_each, read_image_bytes
from clip_retrieval.errors import UserError, format_counts
from clip_retrieval.files import to_json, write_atomic, write_json
from clip_retrieval.log import log, progress_bar
from clip_retrieval.options import DataOptions

MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"RIFF": "webp"}


def export_shards(options: DataOptions, output: Path, splits: Sequence[str] = (), shard_size: int = 1000) -> None:
    """Write the splits of a data set to `output` as shards, and the number of images in each shard to sizes.json.

    Raises UserError if a split is missing, its shards exist already, an existing sizes.json is not a table, an image
    cannot be read, or the folder cannot be written.
    """
    table = output / SIZES
    sizes = read_sizes(table)
    export_each(options, output, splits, lambda dataset, name: sizes.update(_export(dataset, output, name, shard_size)))
    write_json(table, sizes)


def _export(dataset: RetrievalDataset, output: Path, name: str, shard_size: int) -> dict[str, int]:
    """Write `output`/{name}-00000.tar and so on; return the number of images in each.

    Images without a caption are skipped. Images keep the bytes of their files; only a format that shards lack is
    encoded again. One caption is a .txt, several are a list in a .json.
    """
    if existing := next(output.glob(f"{name}-*.tar"), None):
        raise UserError(f"--output {output}: holds {existing.name} already; delete it, or choose another folder")
    first = dataset.first_pair
    images_with_captions = np.flatnonzero(first[1:] > first[:-1]).tolist()
    sizes: dict[str, int] = {}
    with progress_bar(total=len(images_with_captions), desc=name) as bar:
        for number, start in enumerate(range(0, len(images_with_captions), shard_size)):
            batch = images_with_captions[start : start + shard_size]
            shard = output / f"{name}-{number:05}.tar"
            with write_atomic(shard) as file, tarfile.open(fileobj=file, mode="w") as tar:
                for image in batch:
                    captions = [dataset.captions[i] for i in dataset.pairs[first[image] : first[image + 1], 1]]
                    _add_sample(tar, f"{image:09}", *_encode(dataset, image), captions)
                    bar.update()
            sizes[shard.name] = len(batch)
    log.info(f"{output / name}-*.tar: {format_counts(shard=len(sizes), image=len(images_with_captions))}")
    return sizes


def _encode(dataset: RetrievalDataset, image: int) -> tuple[str, bytes]:
    """Return ending and bytes of an image, in a format that shards have."""
    content = read_image_bytes(dataset.images, image)
    ending = next((ending for magic, ending in MAGIC.items() if content.startswith(magic)), None)
    if ending is not None:
        return ending, content
    file = io.BytesIO()
    decode_rgb(io.BytesIO(content), dataset.images.name(image)).save(file, "png")
    return "png", file.getvalue()


def _add_sample(tar: tarfile.TarFile, key: str, ending: str, image: bytes, captions: Sequence[str]) -> None:
    _add(tar, f"{key}.{ending}", image)
    if len(captions) == 1:
        _add(tar, f"{key}.txt", captions[0].encode())
    else:
        _add(tar, f"{key}.json", to_json({CAPTION: captions}))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
