"""Changes of values in a document that stays well-formed, so that they pass the parser and reach the reader.

The functions have the signature of those in `containers`.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import warnings
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from tests.faults.containers import Change

DEEP = 3000  # nested lists
STRANGE_TEXTS = (
    *("", " ", "\0", "a\0b", "\ud800", "x\udfff.jpg", "a" * 5000, "/", "..", "../x", "/dev/zero", "~", "\n", "\u2028"),
    *("é", "e\u0301", "C:\\a.jpg", "%s", "{}", "-1", "9" * 5000, "nan", "true", "null", "train", "val", "0.jpg"),
    *("\ufeff", "\u202e", "😀", "[SEP]", "<|endoftext|>", "tiny", "a/../a.jpg", "https://example.org/a.jpg", "*", '"'),
)
STRANGE_NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, -0.0, 1e300, 1e-300),
    *(float("nan"), float("inf"), -float("inf")),
)
Value = Any


def strange_value(rng: Random) -> Value:
    """A JSON value of any type."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(STRANGE_NUMBERS)
    if kind < 6:
        return rng.choice(STRANGE_TEXTS)
    some = rng.choice(STRANGE_NUMBERS), rng.choice(STRANGE_TEXTS)
    return rng.choice(
        (None, True, False, [], {}, [[]], [None], {"": None}, list(some), {some[1]: some[0]}, [{}], "deep")
    )


def _nodes(value: Value) -> Iterator[tuple[Any, Any]]:
    """Yield (dict or list, key) of every value within `value`."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _nodes(value[key])


def _alter(content: Value, rng: Random, strange: Callable[[Random], Value]) -> Value:
    """Replace, delete, copy, repeat or rename one value somewhere in `content`."""
    nodes = list(_nodes(content))
    if not nodes or rng.random() < 0.02:
        return strange(rng)
    holder, key = rng.choice(nodes)
    kind = rng.random()
    if kind < 0.65:
        holder[key] = strange(rng)
    elif kind < 0.75:
        del holder[key]
    elif kind < 0.85:
        other, other_key = rng.choice(nodes)
        holder[key] = copy.deepcopy(other[other_key])
    elif isinstance(holder, list):
        holder.extend([holder[key]] * rng.choice((1, 1, 500)))
    else:
        holder[rng.choice(STRANGE_TEXTS)] = holder.pop(key)
    return content


def change_json(document: bytes, rng: Random, change: Change) -> bytes:
    """Change a value of a JSON document, or of one line of JSON lines."""
    lines = document.splitlines()
    try:
        content = json.loads(document)
        chosen = None
    except ValueError:
        chosen = rng.randrange(len(lines))
        content = json.loads(lines[chosen])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = _alter(content, rng, strange_value)
    text = json.dumps(content, ensure_ascii=rng.random() < 0.7)
    text = text.replace('"deep"', "[" * DEEP + "]" * DEEP)
    changed = text.encode("utf-8", "surrogatepass")
    if chosen is None:
        return changed
    lines[chosen] = changed
    return b"\n".join(lines) + b"\n"


def change_cells(document: bytes, rng: Random, change: Change) -> bytes:
    """Change a cell of a table, which stays well-formed."""
    text = document.decode()
    delimiter = max(",;\t|", key=text.partition("\n")[0].count)
    rows = list(csv.reader(io.StringIO(text), delimiter=delimiter))
    for _ in range(rng.choice((1, 1, 2))):
        row = rng.choice(rows)
        row[rng.randrange(len(row))] = rng.choice(STRANGE_TEXTS)
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows(rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


def strange_tensor(rng: Random) -> Any:
    """A tensor or another value that a checkpoint may hold."""
    import torch

    shape = rng.choice(((), (0,), (1,), (3,), (2, 3), (8, 8), (1, 1, 1, 1), (1000,)))
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool)
    tensor = torch.ones(shape, dtype=rng.choice((*kinds, torch.complex64, torch.uint8)))
    made = (
        lambda: tensor,
        lambda: torch.full(shape, rng.choice((float("nan"), float("inf"), 1e38))),
        lambda: torch.zeros(1).as_strided(rng.choice(((10**9,), (50_000, 40_000))), (0,) * rng.choice((1, 2)))[:],
        lambda: torch.empty(shape, device="meta"),
        lambda: torch.eye(4).to_sparse(),
        lambda: torch.eye(4).to_sparse_csr(),
        lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        lambda: torch.nn.Parameter(torch.ones(3)),
        lambda: torch.arange(12.0).reshape(3, 4).T,
        lambda: torch.ones(3).expand(1000, 3),
        lambda: strange_value(rng),
        lambda: (1, 2),
        lambda: {1: 2},
    )
    try:
        return rng.choice(made)()
    except (RuntimeError, TypeError, ValueError):
        return tensor


def change_checkpoint(document: bytes, rng: Random, change: Change) -> bytes:
    """Change a value of a torch.save file: replace a tensor or a number, or delete a key."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = torch.load(io.BytesIO(document), weights_only=True)
        for _ in range(rng.choice((1, 1, 2))):
            content = _alter(content, rng, strange_tensor)
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=document.startswith(b"PK"))
    return file.getvalue()
