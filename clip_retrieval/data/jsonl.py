"""Files of one JSON record a line: read with errors that name the line, written whole or not at all.

Nothing here imports torch: the processes that read a large file start quickly.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from clip_retrieval.errors import UserError

try:
    import orjson
except ImportError:
    orjson = None

Id = int | str


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that gets its name when all is written. Raises UserError where it cannot be written."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        file = temporary.open("wb")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another place") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write text lines, each without its line break."""
    with written(path) as file:
        file.writelines(f"{line}\n".encode() for line in lines)


def opened(path: Path) -> BinaryIO:
    """The file, to read from. Raises UserError where it cannot be read."""
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, record) of each line that is not empty. Raises UserError, naming the line."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                try:
                    yield number, record(line)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: {error}") from None


def record(line: bytes) -> dict[str, Any]:
    """The JSON object on a line. Raises ValueError, with a reason, where there is another thing."""
    try:
        content = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte 0x{line[error.start]:02x}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise ValueError("several records are glued together; each stands on a line of its own") from None
        raise ValueError(f"broken JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("broken JSON (nested too deeply)") from None
    if not isinstance(content, dict):
        raise ValueError(f"not a JSON object, but a {type(content).__name__}")
    return content


def record_of_numbers(line: bytes, key: str) -> dict[str, Any]:
    """The same as `record`, several times faster where a list of many numbers goes with the id under `key`.

    With orjson, where it is installed. What that does not take (whole numbers beyond 64 bit become inexact, NaN is none
    of its numbers) the standard library reads.
    """
    if orjson is not None:
        try:
            content = orjson.loads(line)
        except orjson.JSONDecodeError:
            return record(line)
        if isinstance(content, dict) and is_id(content.get(key)):
            return content
    return record(line)


def is_id(value: Any) -> bool:
    """Whether a JSON value can be an id: a whole number, or a text."""
    return type(value) in (int, str)


def id_of(content: dict[str, Any], key: str) -> Id:
    """The id under `key`. Raises ValueError where there is none."""
    value = content.get(key)
    if not is_id(value):
        what = f"{value!r} as " if key in content else "no "
        raise ValueError(f'{what}"{key}": expected a whole number or a text')
    return value
