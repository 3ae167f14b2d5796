"""Tar shards for tests."""

import csv
import functools
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


@functools.cache
def jpeg(seed: int, height: int = 20, width: int = 24) -> bytes:
    """A small JPEG, different for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg")
    return file.getvalue()


def numbered(first: int, number: int) -> list[tuple[str, dict[str, bytes | str]]]:
    """Samples whose captions are numbers in words: `thing one two` is number 12."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    return [
        (f"{i:05}", {"jpg": jpeg(i), "txt": " ".join(["thing", *(words[int(digit)] for digit in str(i))])})
        for i in range(first, first + number)
    ]


def write_shard(path: Path, samples) -> Path:
    """Write a tar of (key, {ending: content}) samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, parts in samples:
            for ending, content in parts.items():
                content = content.encode() if isinstance(content, str) else content
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder: Path, counts, prefix: str = "train", first: int = 0) -> list[Path]:
    """Write shards {prefix}-000.tar, ... of so many numbered samples each."""
    paths = []
    for shard, count in enumerate(counts):
        paths.append(write_shard(folder / f"{prefix}-{shard:03}.tar", numbered(first, count)))
        first += count
    return paths


def shards_of_csv(table: Path, folder: Path, a_shard: int = 5) -> Path:
    """Write the images of a CSV, with their captions in a .json, as {split}-000.tar, ... of a few images each."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for split in ("train", "val", "test"):
        captions: dict[str, list[str]] = {}
        for row in rows:
            if row["split"] == split:
                captions.setdefault(row["image"], []).append(row["caption"])
        samples = [
            (
                f"{int(Path(image).stem):05}",
                {"jpg": (table.parent / image).read_bytes(), "json": json.dumps({"caption": c})},
            )
            for image, c in captions.items()
        ]
        for start in range(0, len(samples), a_shard):
            write_shard(folder / f"{split}-{start // a_shard:03}.tar", samples[start : start + a_shard])
    return folder
