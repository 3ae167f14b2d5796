"""Reader of Chinese-CLIP's pickled pairs, (image id, text id, text), without an unpickler.

An unpickler builds any object, and 20 bytes can make it allocate gigabytes. This reader supports whole numbers, texts
and one tuple, in all protocols from 0 to 5; everything else is refused.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Sequence

MOST_DIGITS, MOST_BYTES = 2500, 2**10  # of an id
MOST_OPERATIONS = 50  # protocol 0 needs 9
DEEPEST = 4  # values on the stack: a mark and three values
NOT_AN_ID = "it holds a number that is not an id"
NO_PAIR = "it is not an image id, a text id and a text"


def _make_formats(operations: Sequence[bytes], letters: str) -> dict[int, struct.Struct]:
    """Return the format of each operation's argument."""
    return {operation[0]: struct.Struct(f"<{letter}") for operation, letter in zip(operations, letters)}


_SKIPPED = {pickle.PROTO[0]: 1, pickle.FRAME[0]: 8}  # operation: bytes of its argument
_NUMBERS = _make_formats((pickle.BININT, pickle.BININT1, pickle.BININT2), "iBH")
_TEXTS = _make_formats((pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8), "BIQ")
_LONGS = _make_formats((pickle.LONG1, pickle.LONG4), "BI")
_PUTS = _make_formats((pickle.BINPUT, pickle.LONG_BINPUT), "BI")
_GETS = _make_formats((pickle.BINGET, pickle.LONG_BINGET), "BI")
_LINES = {op[0] for op in (pickle.INT, pickle.LONG, pickle.UNICODE, pickle.PUT, pickle.GET)}
_MEMOIZE, _MARK = pickle.MEMOIZE[0], pickle.MARK[0]
_TUPLE, _TUPLE3, _STOP = pickle.TUPLE[0], pickle.TUPLE3[0], pickle.STOP[0]
_THE_MARK = object()


def read_pair(pickled: bytes) -> tuple[int | str, int | str, str]:
    """Read image id, text id and text. Raises ValueError, with the reason, for anything else."""
    try:
        pair = _run(pickled)
    except (IndexError, KeyError, struct.error, UnicodeDecodeError):
        raise ValueError("it is not a complete pickle") from None
    if type(pair) is not tuple or len(pair) != 3:
        raise ValueError(NO_PAIR)
    if not isinstance(pair[0], (int, str)) or not isinstance(pair[1], (int, str)) or not isinstance(pair[2], str):
        raise ValueError(NO_PAIR)
    return pair


def _run(pickled: bytes) -> object:
    """Run the operations and return their result."""
    stack: list[object] = []
    memo: dict[int, object] = {}
    at = 0
    for _ in range(MOST_OPERATIONS):
        if len(stack) > DEEPEST:
            break
        operation = pickled[at]
        at += 1
        # values
        if operation in _TEXTS:
            layout = _TEXTS[operation]
            size, at = layout.unpack_from(pickled, at)[0], at + layout.size
            stack.append(_take(pickled, at, size).decode("utf-8", "surrogatepass"))
            at += size
        elif operation in _NUMBERS:
            layout = _NUMBERS[operation]
            stack.append(layout.unpack_from(pickled, at)[0])
            at += layout.size
        elif operation in _LONGS:
            layout = _LONGS[operation]
            size, at = layout.unpack_from(pickled, at)[0], at + layout.size
            if size > MOST_BYTES:
                raise ValueError(NOT_AN_ID)
            stack.append(int.from_bytes(_take(pickled, at, size), "little", signed=True))
            at += size
        # memo
        elif operation == _MEMOIZE:
            memo[len(memo)] = stack[-1]
        elif operation in _PUTS:
            memo[_check_memo_index(_PUTS[operation].unpack_from(pickled, at)[0])] = stack[-1]
            at += _PUTS[operation].size
        elif operation in _GETS:
            stack.append(memo[_GETS[operation].unpack_from(pickled, at)[0]])
            at += _GETS[operation].size
        # tuple, skipped operations and stop
        elif operation in _SKIPPED:
            at += _SKIPPED[operation]
        elif operation == _MARK:
            stack.append(_THE_MARK)
        elif operation == _TUPLE3:
            stack[-3:] = [_make_tuple(stack[-3:])]
        elif operation == _TUPLE:
            mark = len(stack) - 1 - stack[::-1].index(_THE_MARK) if _THE_MARK in stack else 0
            stack[mark:] = [_make_tuple(stack[mark + 1 :])]
        elif operation in _LINES:
            at = _run_line(operation, pickled, at, stack, memo)
        elif operation == _STOP:
            return stack[-1]
        else:
            raise ValueError(_describe(operation, pickled[at:], stack))
    raise ValueError(NO_PAIR)


def _take(pickled: bytes, at: int, size: int) -> bytes:
    if at + size > len(pickled):
        raise IndexError
    return pickled[at : at + size]


def _make_tuple(parts: list[object]) -> tuple[object, ...]:
    if len(parts) != 3 or any(isinstance(part, tuple) for part in parts):
        raise ValueError(NO_PAIR)
    return tuple(parts)


def _check_memo_index(number: int) -> int:
    """Check an index of the memo; picklers count from 0 or 1."""
    if number > MOST_OPERATIONS:
        raise ValueError(f"it asks for a memo of {number:,} entries")
    return number


def _run_line(operation: int, pickled: bytes, at: int, stack: list[object], memo: dict[int, object]) -> int:
    """Run an operation of protocol 0, whose argument is a line of text; return the position of the next operation."""
    if (end := pickled.find(b"\n", at)) < 0:
        raise IndexError
    line = pickled[at:end]
    if operation == pickle.UNICODE[0]:
        stack.append(line.decode("raw-unicode-escape"))
        return end + 1
    digits = line.removesuffix(b"L") if operation == pickle.LONG[0] else line
    if not digits.removeprefix(b"-").isdigit() or len(digits) > MOST_DIGITS or digits in (b"00", b"01"):  # booleans
        raise ValueError(NOT_AN_ID)
    number = int(digits)
    if operation == pickle.PUT[0]:
        memo[_check_memo_index(number)] = stack[-1]
    elif operation == pickle.GET[0]:
        stack.append(memo[number])
    else:
        stack.append(number)
    return end + 1


def _describe(operation: int, rest: bytes, stack: list[object]) -> str:
    if operation == pickle.GLOBAL[0]:
        return "it names " + ".".join(line.decode(errors="replace") for line in rest.split(b"\n")[:2])
    if operation == pickle.STACK_GLOBAL[0]:
        return f"it names {'.'.join(str(name) for name in stack[-2:])}"
    return "it holds more than numbers and texts"
