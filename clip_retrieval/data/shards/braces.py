"""Expand the braces of shard patterns, `{00000..01537}`, within limits: a short pattern can have billions of names."""

from __future__ import annotations

import re

from braceexpand import alphabet, braceexpand

from clip_retrieval.errors import UserError

# Ranges of numbers and of letters, the most names that they may expand to, and the deepest nesting.
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
_LETTERS = re.compile(r"[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?")
MAX_SHARDS, MAX_CHARACTERS = 10**6, 10**9
MAX_BRACE_DEPTH = 50


def expand_braces(pattern: str, source: str) -> list[str]:
    """Expand a pattern's braces to names. Raises UserError, naming `source`, if they do not match or give too many."""
    try:
        number = count_expansions(pattern)
        if number > MAX_SHARDS or number * len(pattern) > MAX_CHARACTERS:
            raise UserError(f"{source}: the braces expand to more than {MAX_SHARDS:,} shards; correct the numbers")
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{source}: the braces do not match ({error}); write {{00000..00099}}") from None


def count_expansions(pattern: str) -> int:
    """Count the names that `braceexpand` would make, at most MAX_SHARDS + 1, without making them.

    Raises ValueError for deep nesting, because `braceexpand` is recursive.
    """
    # For each open brace: the number of names of the finished alternatives and of the current one.
    groups, begins = [[0, 1]], [0]
    for token in re.finditer(r"\\.|[{},]", pattern, re.DOTALL):
        if token[0] == "{":
            groups.append([0, 1])
            begins.append(token.end())
            if len(groups) > MAX_BRACE_DEPTH:
                raise ValueError(f"nested more than {MAX_BRACE_DEPTH} deep")
        elif len(groups) > 1 and token[0] == ",":
            groups[-1] = [sum(groups[-1]), 1]
        elif len(groups) > 1 and token[0] == "}":
            number, begin = sum(groups.pop()), begins.pop()
            if numbers := _RANGE.fullmatch(pattern, begin, token.start()):
                first, last, step = (int(text or 1) for text in numbers.groups())
                number = abs(last - first) // (step or 1) + 1
            elif _LETTERS.fullmatch(pattern, begin, token.start()):
                number = len(alphabet)
            groups[-1][1] = min(groups[-1][1] * number, MAX_SHARDS + 1)
    return groups[0][1]
