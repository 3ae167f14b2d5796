"""Damaged copies of a document; the same seed gives the same bytes on any machine.

mutate(b'{"id": 12}', random.Random(3), tokens=(b"null", b"[")) -> b'{"id": 9223372036854775808}'
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

ROUNDS = (1, 1, 1, 1, 1, 1, 2, 2, 3, 5)
"""Numbers of changes to a document, one of which is drawn."""
BLOCK = 64  # usual maximum length of a block in bytes
ENDS = 256  # bytes at both ends of a document, where its headers are
REPEATS = (1, 1, 1, 1, 2, 40, 2000)
LONGEST = 1 << 17  # largest growth of a document in bytes

WIDTHS = (1, 2, 4, 8)
EXTREMES = (0, -1, 1, 2**7, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
"""Values for an integer field, truncated to its lowest bytes."""
NUMBERS = (
    *(b"0", b"-1", b"-0", b"1e999", b"-1e999", b"NaN", b"Infinity", b"1.5", b"null", b'"7"', b"true"),
    *(b"2147483647", b"-2147483649", b"9223372036854775807", b"9223372036854775808", b"18446744073709551616"),
    *(b"1" * 5000, b"0.0000000000000000001", b"1000000000000"),
)
"""Replacements for a number in a text."""
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")

Random = random.Random


def mutate(document: bytes, rng: Random, *, others: Sequence[bytes] = (), tokens: Sequence[bytes] = ()) -> bytes:
    """Return a copy of `document` with one to five changes.

    Args:
        document: the bytes.
        rng: the only source of randomness.
        others: valid documents of the same format, to splice with.
        tokens: words of the format, to insert or to write over bytes.
    """
    data = document
    for _ in range(rng.choice(ROUNDS)):
        data = rng.choice(CHANGES)(data, rng, others, tokens)[: len(document) + LONGEST]
    return data


def _place(rng: Random, length: int) -> int:
    """A position from 0 to `length`, in half of the cases near the beginning or the end."""
    kind = rng.random()
    if kind < 0.35:
        return rng.randint(0, min(length, ENDS))
    if kind < 0.5:
        return rng.randint(max(0, length - ENDS), length)
    return rng.randint(0, length)


def _block(rng: Random, length: int) -> tuple[int, int]:
    """Begin and end of a block; in one of ten cases of any length that the document allows."""
    begin = _place(rng, length)
    longest = length - begin if rng.random() < 0.1 else min(BLOCK, length - begin)
    return begin, begin + rng.randint(0, longest)


def _flip_bit(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    at = _place(rng, max(0, len(data) - 1))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else data


def _set_byte(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    at = _place(rng, max(0, len(data) - 1))
    return data[:at] + bytes([rng.choice((0, 0xFF, 0x7F, 0x80, rng.randrange(256)))]) + data[at + 1 :]


def _set_range(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    begin, end = _block(rng, len(data))
    return data[:begin] + bytes([rng.choice((0, 0xFF, rng.randrange(256)))]) * (end - begin) + data[end:]


def _truncate(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    return data[: _place(rng, len(data))]


def _delete(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    begin, end = _block(rng, len(data))
    return data[:begin] + data[end:]


def _duplicate(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    begin, end = _block(rng, len(data))
    at = rng.choice((end, _place(rng, len(data))))
    return data[:at] + data[begin:end] * rng.choice(REPEATS) + data[at:]


def _swap(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    a, b, c, d = sorted((*_block(rng, len(data)), *_block(rng, len(data))))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _splice(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """Join the beginning of one document and the end of another, or insert a block of the other."""
    other = rng.choice(others) if others else data
    if rng.random() < 0.5:
        return data[: _place(rng, len(data))] + other[_place(rng, len(other)) :]
    (begin, end), at = _block(rng, len(other)), _place(rng, len(data))
    return data[:at] + other[begin:end] + data[at:]


def _set_integer(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    width, at = rng.choice(WIDTHS), _place(rng, len(data))
    if rng.random() < 0.5:
        at -= at % width
    value = rng.choice(EXTREMES) % 256**width
    return data[:at] + value.to_bytes(width, rng.choice(("little", "big"))) + data[at + width :]


def _set_number(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """Replace a number in digits by another one."""
    near = _place(rng, len(data))
    found = _NUMBER.search(data, near, near + 4096) or _NUMBER.search(data[:4096])
    if found is None:
        return _set_integer(data, rng, others, tokens)
    return data[: found.start()] + rng.choice(NUMBERS) + data[found.end() :]


def _insert_token(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    if not tokens:
        return _duplicate(data, rng, others, tokens)
    at = _place(rng, len(data))
    return data[:at] + rng.choice(tokens) * rng.choice(REPEATS) + data[at:]


def _overwrite_token(data: bytes, rng: Random, others: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """Write a token over as many bytes, or over another token of the document."""
    if not tokens:
        return _set_range(data, rng, others, tokens)
    token, old = rng.choice(tokens), rng.choice(tokens)
    at = data.find(old, _place(rng, len(data))) if rng.random() < 0.7 else -1
    if at >= 0:
        return data[:at] + token + data[at + len(old) :]
    at = _place(rng, len(data))
    return data[:at] + token + data[at + len(token) :]


Change = Callable[[bytes, Random, Sequence[bytes], Sequence[bytes]], bytes]
CHANGES: tuple[Change, ...] = (
    *(_flip_bit, _set_byte, _set_range, _truncate, _delete, _duplicate, _swap, _splice),
    *(_set_integer, _set_integer, _set_number, _set_number, _insert_token, _insert_token, _overwrite_token),
)
