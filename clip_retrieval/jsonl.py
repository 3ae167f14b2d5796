"""Files with one JSON record per line: read with errors that name the line, written atomically."""

from __future__ import annotations

import codecs
import json
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from clip_retrieval.errors import UserError
from clip_retrieval.files import explain_errors, open_regular, parse_json, write_atomic

orjson: Any
try:
    import orjson
except ImportError:
    orjson = None

Id = int | str

LONGEST_LINE = 2**27  # bytes
LONGEST_ID = 2**13  # bits of an integer, about 2,400 digits: str() refuses more than 4,300


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines, given without line breaks, atomically. Raises OSError if the path cannot be written."""
    with write_atomic(path) as file:
        file.writelines(f"{line}\n".encode() for line in lines)


@contextmanager
def open_input(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file to read bytes. Raises UserError if it cannot be opened, or read while it is open."""
    with explain_errors(path), open_regular(path) as file:
        yield file


def read_lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line) of each non-empty line. Raises UserError for a line over LONGEST_LINE."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise UserError(f"{path}, line {number}: longer than {LONGEST_LINE:,} bytes; write one record per line")
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.isspace():
            yield number, line


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, record) of each non-empty line. Raises UserError, naming the line, for invalid JSON."""
    with open_input(path) as file:
        for number, line in read_lines(file, path):
            try:
                yield number, parse_record(line)
            except ValueError as error:
                remedy = "" if ";" in str(error) else "; correct the line, or fetch the file again"
                raise UserError(f"{path}, line {number}: {error}{remedy}") from None


def parse_record(line: bytes) -> dict[str, Any]:
    """Parse the JSON object on a line. Raises ValueError, with a reason, for anything else."""
    try:
        content = parse_json(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte 0x{error.object[error.start]:02x}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise ValueError("several records are glued together; write one record per line") from None
        raise ValueError(f"broken JSON ({error.msg}, column {error.colno})") from None
    except ValueError as error:
        raise ValueError(f"broken JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"not a JSON object, but a {type(content).__name__}")
    return content


def parse_record_of_numbers(line: bytes, key: str) -> dict[str, Any]:
    """Like `parse_record`, but several times faster for long lists of numbers, if orjson is installed.

    The standard library parses what orjson cannot: NaN, and an id under `key` that is not valid, because orjson turns
    integers beyond 64 bits into floats.
    """
    if orjson is not None:
        try:
            content = orjson.loads(line)
        except orjson.JSONDecodeError:
            return parse_record(line)
        if isinstance(content, dict) and is_id(content.get(key)):
            return content
    return parse_record(line)


def is_id(value: Any) -> TypeGuard[Id]:
    """Whether a value can be an id: text, or an integer that can be printed."""
    return type(value) is str or (type(value) is int and value.bit_length() <= LONGEST_ID)


def get_id(content: dict[str, Any], key: str) -> Id:
    """The id under `key`. Raises ValueError if it is missing or invalid."""
    value = content.get(key)
    if not is_id(value):
        found = f"{reprlib.repr(value)} as " if key in content else "no "
        raise ValueError(f'{found}"{key}": expected a whole number or a text')
    return value
