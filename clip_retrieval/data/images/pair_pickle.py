"""Reader of Chinese-CLIP's pickled pairs, (image id, text id, text).

The unpickler knows only the operations of whole numbers, texts, the memo and tuples, in all protocols from 0 to 5. It
is the one in Python: C's allocates memory up to any number of an entry in the memo.
"""

from __future__ import annotations

import io
import pickle
import reprlib
from typing import Any, ClassVar

MOST_BITS = 2**13  # of an id that is a number
NO_PAIR = "it is not a pickle of an image id, a text id and a text"

_OPERATIONS = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.TUPLE, pickle.TUPLE3),
    *(pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG, pickle.LONG1, pickle.LONG4),
    *(pickle.UNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL),  # to name the object in the message
    *(pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GET, pickle.BINGET, pickle.LONG_BINGET),
)
_PythonUnpickler: Any = pickle._Unpickler


class _ObjectError(Exception):
    """A pickle names an object."""


class _PairUnpickler(_PythonUnpickler):
    dispatch: ClassVar = {code[0]: _PythonUnpickler.dispatch[code[0]] for code in _OPERATIONS}

    def find_class(self, module: str, name: str) -> None:
        raise _ObjectError(f"it names {reprlib.repr(f'{module}.{name}')}")


def read_pair(pickled: bytes) -> tuple[int | str, int | str, str]:
    """Read image id, text id and text. Raises ValueError, with the reason, for anything else."""
    try:
        pair = _PairUnpickler(io.BytesIO(pickled)).load()
    except _ObjectError as error:
        raise ValueError(str(error)) from None
    except Exception:  # broken pickles raise nearly anything; an operation that is not in the table, KeyError
        raise ValueError(NO_PAIR) from None
    if type(pair) is not tuple or [type(part) in (int, str) for part in pair] != [True] * 3 or type(pair[2]) is not str:
        raise ValueError(NO_PAIR)
    if any(type(part) is int and part.bit_length() > MOST_BITS for part in pair):
        raise ValueError("it holds a number that is not an id")
    return pair
