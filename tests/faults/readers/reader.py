"""The definition of a reader, and shared helpers."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.faults.containers import Container
from tests.models.small import small_preprocess

CAPTIONS = ("a red thing", "a small dark thing", "zwei Hunde, größer", "a thing", "红色的包")


@dataclass(frozen=True)
class Reader:
    """A reader of the package.

    Attributes:
        name: the format, for the table.
        make: writes valid documents and the files they need into a folder; returns the documents to damage.
        read: reads a document as a run does, and uses all of it. Raises as a run does for bad input.
        tokens: words of the format.
        containers: change parts within checksums, compression and values; used for 60% of the mutations.
        accepts: whether the documents of `make` are accepted; some readers accept the official files only.
    """

    name: str
    make: Callable[[Path], Sequence[Path]]
    read: Callable[[Path], Any]
    tokens: Sequence[bytes] = ()
    containers: Sequence[Container] = ()
    accepts: bool = True


def encoded_image(number: int, format: str = "jpeg", mode: str = "RGB", **options: Any) -> bytes:
    """The bytes of a small image file."""
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).convert(mode)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def write_images(folder: Path, names: Sequence[str]) -> None:
    """Write a small JPEG under each name."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded_image(number))


@functools.cache
def tokenizer() -> Any:
    """CLIP's tokenizer, for 16 tokens."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=16)


@functools.cache
def transform() -> Any:
    """The preprocessing of a small model."""
    from clip_retrieval.data.pixels.pixels import ImageTransform

    return ImageTransform(small_preprocess())


def use(dataset: Any) -> None:
    """Tokenize the captions of a dataset and decode its images, as a run does."""
    from clip_retrieval.data.captions import tokenize

    if dataset is None:
        return
    tokenize(dataset.captions, tokenizer())
    for index in range(min(len(dataset.images), 8)):
        dataset.images.name(index).encode(errors="backslashreplace")
        transform()(dataset.images[index])
        if hasattr(dataset.images, "stamp"):
            dataset.images.stamp(index)
    dataset.positives(dataset.pairs[:4, 0], dataset.pairs[:4, 1])


def use_splits(splits: Sequence[str], dataset: str, root: Path, **options: Any) -> None:
    """Read and use splits of a dataset."""
    from clip_retrieval.data.catalog import read_dataset
    from clip_retrieval.options import DataOptions

    for split in splits:
        use(read_dataset(DataOptions(dataset=dataset, dataset_root=str(root), **options), split))
