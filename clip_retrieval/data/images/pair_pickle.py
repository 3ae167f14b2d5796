"""Reader of Chinese-CLIP's pickled pairs, (image id, text id, text), without an unpickler.

An unpickler builds any object, and 20 bytes can make it allocate gigabytes. pickletools only parses the operations; of
these, whole numbers, texts, the memo and one tuple are supported, in all protocols from 0 to 5.
"""

from __future__ import annotations

import pickletools
from typing import Any

MOST_BITS = 2**13  # of an id that is a number
MOST_OPERATIONS = 50  # protocol 0 needs 9
DEEPEST = 4  # values on the stack: a mark and three values
NO_PAIR = "it is not an image id, a text id and a text"

_KINDS = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG"), "value"),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"), "value"),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), "put"),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), "get"),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), "skipped"),
    **{name: name for name in ("MEMOIZE", "MARK", "TUPLE", "TUPLE3")},
}
_THE_MARK = object()


class _RefusedError(Exception):
    """The reason why a pickle is refused."""


def read_pair(pickled: bytes) -> tuple[int | str, int | str, str]:
    """Read image id, text id and text. Raises ValueError, with the reason, for anything else."""
    try:
        pair = _run(pickled)
    except _RefusedError as error:
        raise ValueError(str(error)) from None
    except (IndexError, KeyError, ValueError):  # pickletools raises ValueError
        raise ValueError("it is not a complete pickle") from None
    if type(pair) is not tuple or len(pair) != 3 or any(type(part) not in (int, str) for part in pair):
        raise ValueError(NO_PAIR)
    if any(type(part) is int and part.bit_length() > MOST_BITS for part in pair):
        raise ValueError("it holds a number that is not an id")
    if type(pair[2]) is not str:
        raise ValueError(NO_PAIR)
    return pair


def _run(pickled: bytes) -> Any:
    """Run the operations and return their result."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for number, (operation, argument, _) in enumerate(pickletools.genops(pickled)):
        kind = _KINDS.get(operation.name)
        if kind == "value":
            stack.append(argument)
        elif kind == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif kind == "put" and argument <= MOST_OPERATIONS:
            memo[argument] = stack[-1]
        elif kind == "get":
            stack.append(memo[argument])
        elif kind == "MARK":
            stack.append(_THE_MARK)
        elif kind == "TUPLE3":
            stack[-3:] = [tuple(stack[-3:])]
        elif kind == "TUPLE":
            mark = stack.index(_THE_MARK)
            stack[mark:] = [tuple(stack[mark + 1 :])]
        elif kind != "skipped":
            raise _RefusedError(_describe(operation.name, argument, stack))
        if number > MOST_OPERATIONS or len(stack) > DEEPEST:
            raise _RefusedError(NO_PAIR)
    return stack[-1]


def _describe(operation: str, argument: Any, stack: list[Any]) -> str:
    if operation == "GLOBAL":
        return f"it names {argument.replace(' ', '.')}"
    if operation == "STACK_GLOBAL":
        return f"it names {'.'.join(str(name) for name in stack[-2:])}"
    return "it holds more than numbers and texts"
