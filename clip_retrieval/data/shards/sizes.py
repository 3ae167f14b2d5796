"""The numbers of samples of shards, from the `sizes.json` beside them: a table {file name: samples}."""

from __future__ import annotations

import reprlib
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip_retrieval.data.shards.remote import Url, read_small
from clip_retrieval.data.shards.sources import Place, is_forward
from clip_retrieval.errors import UserError
from clip_retrieval.files import parse_json, read_json

SIZES = "sizes.json"
MIN_SAMPLE_BYTES = 2 * tarfile.BLOCKSIZE  # bytes: the headers of an image and a caption
MAX_SAMPLES = 10**7  # of a remote or compressed shard, whose size in bytes does not tell
MAX_SIZES_BYTES = 2**26  # of a remote sizes.json


def known_sizes(paths: Sequence[Place]) -> list[int | None]:
    """Read the number of samples of each shard from the `sizes.json` in its folder; None if it is not listed.

    Raises UserError if a value is not a number that the shard can hold, and RunError if a server fails.
    """
    tables: dict[Place, dict] = {}
    found: list[int | None] = []
    for path in paths:
        source = path.beside(SIZES) if isinstance(path, Url) else path.parent / SIZES
        if source not in tables:
            tables[source] = read_sizes(source)
        size = tables[source].get(path.name)
        if size is not None and not _is_count(size, path):
            raise UserError(f"{source}: {path.name} has {reprlib.repr(size)} samples; correct or delete the file")
        found.append(None if size is None else int(size))
    return found


def read_sizes(source: Place) -> dict[str, Any]:
    """Read a `sizes.json`; an empty table if there is no file. Raises UserError unless it is a table."""
    if isinstance(source, Path):
        table = read_json(source) if source.is_file() else {}
    else:
        try:
            content = read_small(source, MAX_SIZES_BYTES)
            table = {} if content is None else parse_json(content)
        except ValueError as error:
            raise UserError(f"{source}: broken JSON ({error}); correct or delete the file") from None
    if not isinstance(table, dict):
        raise UserError(f"{source}: not a table of samples by shard; correct or delete the file")
    return table


def _is_count(size: object, shard: Place) -> bool:
    """Whether `size` is a number of samples that the shard can hold: memory is allocated for that many."""
    if isinstance(size, str) and size.isascii() and size.isdecimal() and len(size) < 20:
        size = int(size)
    largest = MAX_SAMPLES
    if isinstance(shard, Path) and not is_forward(shard):
        try:
            largest = shard.stat().st_size // MIN_SAMPLE_BYTES
        except OSError:
            return False
    return type(size) is int and 0 <= size <= largest
