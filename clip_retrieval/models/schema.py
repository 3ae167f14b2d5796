"""Schemas of nested values from files, with readable errors.

A check is a function of a value and its place (`vision_cfg.layers`) that raises SchemaError:

    check = record(required={"size": whole(1, 4096)}, optional={"mode": one_of("RGB")})
    check({"size": 0}, "preprocess")    # SchemaError: preprocess.size is 0, not a whole number from 1 to 4,096
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

import torch

from clip_retrieval.errors import format_counts
from clip_retrieval.models.pickled import Unusable

Check = Callable[[Any, str], None]

DEEPEST = 32
MOST_VALUES = 2_000_000
"""Limit of nested values in a value without its own check; a multilingual vocabulary has 250,000."""


class SchemaError(ValueError):
    """An invalid value: names its place and the expected value."""


def whole(low: int = 0, high: int = 2**63 - 1) -> Check:
    """Check for an integer in a range, both ends included."""

    def check(value: Any, place: str) -> None:
        if type(value) is not int or not low <= value <= high:
            raise _mismatch(value, place, f"a whole number from {low:,} to {high:,}")

    return check


def number(above: float = -math.inf) -> Check:
    """Check for a finite int or float greater than `above`."""

    def check(value: Any, place: str) -> None:
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max or value <= above:
            raise _mismatch(value, place, "a finite number" + f" above {above:g}" * (above > -math.inf))

    return check


def one_of(*choices: Any) -> Check:
    """Check for one of a few values."""

    def check(value: Any, place: str) -> None:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise _mismatch(value, place, f"one of {', '.join(map(str, choices))}")

    return check


def text(value: Any, place: str) -> None:
    """Check for a string."""
    if type(value) is not str:
        raise _mismatch(value, place, "text")


def sequence(item: Check, *lengths: int, empty: bool = True) -> Check:
    """Check for a list or tuple, of one of `lengths` if any are given; with empty=False it must have elements."""

    def check(value: Any, place: str) -> None:
        if type(value) not in (list, tuple):
            raise _mismatch(value, place, "a list")
        if (lengths and len(value) not in lengths) or not (value or empty):
            expected = " or ".join(map(str, lengths)) or "1 or more"
            raise SchemaError(f"{place} has {format_counts(value=len(value))}, not {expected}")
        for index, element in enumerate(value):
            item(element, f"{place}[{index}]")

    return check


def entries(item: Check, key: type = str) -> Check:
    """Check for a dict with keys of one type."""

    def check(value: Any, place: str) -> None:
        if type(value) is not dict:
            raise _mismatch(value, place, "a dict")
        for name, element in value.items():
            if type(name) is not key:
                raise _mismatch(name, f"a key of {place}", f"of the type {key.__name__}")
            item(element, f"{place}.{name}")

    return check


def record(
    required: dict[str, Check] | None = None, optional: dict[str, Check] | None = None, rest: Check | None = None
) -> Check:
    """Check for a dict of named values: required ones, optional ones, and all others (`rest`)."""
    named, others = {**(required or {}), **(optional or {})}, rest or plain

    def check(value: Any, place: str) -> None:
        if type(value) is not dict:
            raise _mismatch(value, place, "a dict")
        if missing := [name for name in required or {} if name not in value]:
            raise SchemaError(f"{place or 'it'} has no {', '.join(missing)}")
        for name, element in value.items():
            if type(name) is not str:
                raise _mismatch(name, f"a key of {place or 'it'}", "text")
            named.get(name, others)(element, f"{place}.{name}" if place else name)

    return check


def either(*checks: Check) -> Check:
    """Check that any of the checks passes; the message is the last one's."""

    def check(value: Any, place: str) -> None:
        for other in checks[:-1]:
            try:
                return other(value, place)
            except SchemaError:
                continue
        return checks[-1](value, place)

    return check


def nothing(value: Any, place: str) -> None:
    """Check for None."""
    if value is not None:
        raise _mismatch(value, place, "null")


def unknown(value: Any, place: str) -> None:
    """Refuse every value."""
    raise SchemaError(f"{place} is unknown")


def plain(value: Any, place: str) -> None:
    """Check for numbers, text, and dicts and lists of them, nested up to a limit."""
    stack, visited = [(value, 0)], 0
    while stack:
        inner, depth = stack.pop()
        visited += 1
        if depth > DEEPEST or visited > MOST_VALUES:
            raise SchemaError(f"{place} is nested too deeply, or too large")
        if type(inner) is dict:
            if not all(type(name) in (str, int) for name in inner):
                raise SchemaError(f"{place} has a key that is not text")
            stack.extend((element, depth + 1) for element in inner.values())
        elif type(inner) in (list, tuple):
            stack.extend((element, depth + 1) for element in inner)
        elif type(inner) not in (type(None), bool, int, float, str):
            raise _mismatch(inner, place, "plain numbers and text")


def tensor(value: Any, place: str) -> None:
    """Check for a dense tensor of real numbers."""
    if isinstance(value, Unusable):
        raise SchemaError(value.problem(place))
    if type(value) is not torch.Tensor or value.is_complex():
        raise _mismatch(value, place, "a tensor of real numbers")


def from_hint(hint: Any) -> Check:
    """Make the check of a type hint; an int passes for `float`, a list for a tuple."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return either(*(from_hint(part) for part in sorted(arguments, key=lambda part: part is not type(None))))
    if origin is tuple:
        lengths = () if Ellipsis in arguments else (len(arguments),)
        return sequence(from_hint(arguments[0]), *lengths, empty=False)
    if origin is list:
        return sequence(from_hint(arguments[0]))
    known = {type(None): nothing, bool: one_of(False, True), int: whole(-(2**63)), float: number(), str: text}
    return known.get(hint, entries(plain) if dict in (hint, origin) else plain)


def fields(*classes: type, nullable: bool = False) -> dict[str, Check]:
    """Make the checks of dataclass fields from their type hints; `nullable` also admits null for each."""
    hints = {f.name: typing.get_type_hints(c)[f.name] for c in classes for f in dataclasses.fields(c)}
    return {name: either(nothing, from_hint(hint)) if nullable else from_hint(hint) for name, hint in hints.items()}


def _mismatch(value: Any, place: str, expected: str) -> SchemaError:
    is_short = type(value) in (type(None), bool, int, float, str)
    shown = repr(value[:60] if type(value) is str else value)[:60] if is_short else f"a {type(value).__name__}"
    return SchemaError(f"{place or 'it'} is {shown}, not {expected}")
