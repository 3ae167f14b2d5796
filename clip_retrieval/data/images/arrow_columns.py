"""Columns of a Hugging Face data set saved by `save_to_disk`: a folder of Arrow files, memory-mapped.

    DIR/state.json, DIR/data-00000-of-00004.arrow, ...

pyarrow reads the Arrow files; no code in the folder runs, and nothing is downloaded. An image column holds structs of
the library (bytes or path), plain bytes, base64, paths, or lists with one of these.
"""

from __future__ import annotations

import io
import struct
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_retrieval.data.images.base64_images import decode_base64
from clip_retrieval.data.images.decode import check_encoded_size, decode_rgb
from clip_retrieval.errors import UserError, describe
from clip_retrieval.files import explain_errors, open_regular, read_json

STATE = "state.json"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of a complete Arrow stream
SMALLEST_ROW = 4  # bytes; each row has at least the offset of its image
SAFE_PYARROW = 15  # earlier versions run pickles in the schema


def is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` holds a saved data set, or one split of it."""
    return (folder / STATE).is_file()


def open_columns(folder: Path) -> Any:
    """Open a saved data set as a `pyarrow.Table` that is read from disk on access.

    Raises UserError if pyarrow is missing or too old, or a file is missing, damaged, compressed or not an Arrow stream.
    """
    pyarrow = _import_pyarrow()
    files = list_data_files(folder)
    for file in files:
        _check_complete(file)
    try:
        tables = [_read_stream(file, pyarrow) for file in files]
        table = pyarrow.concat_tables(tables, promote_options="default")
        table.validate()
        table.column_names  # noqa: B018  they may not be UTF-8
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        raise UserError(f"{folder}: not a data set of save_to_disk ({describe(error)}); save it again") from None
    if table.num_rows * SMALLEST_ROW > sum(file.stat().st_size for file in files):
        raise UserError(f"{folder}: {table.num_rows:,} rows are more than its files can hold; save it again")
    return table


def _import_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        pyarrow = None
    if pyarrow is None or int(pyarrow.__version__.partition(".")[0]) < SAFE_PYARROW:
        raise UserError(f"Hugging Face data sets need pyarrow {SAFE_PYARROW} or later: pip install -U pyarrow")
    return pyarrow


def list_data_files(folder: Path) -> list[Path]:
    """List the Arrow files of a saved data set. Raises UserError if state.json is invalid or names other folders."""
    state = read_json(folder / STATE)
    try:
        names = [file["filename"] for file in state["_data_files"]]
        whole = not state.get("_indices_data_files")
    except (AttributeError, KeyError, TypeError):
        names, whole = [], False
    if not whole or not all(isinstance(name, str) and _is_file_name(name) for name in names):
        raise UserError(f"{folder / STATE}: not a state.json of save_to_disk; save the data set again")
    return [folder / name for name in names]


def _is_file_name(name: str) -> bool:
    """Whether a name refers to a file in the folder itself."""
    return name not in ("", ".", "..") and not any(character in name for character in "/\\\0")


def _read_stream(file: Path, pyarrow: Any) -> Any:
    """Read the table in an Arrow file without copying it to memory."""
    for message in pyarrow.ipc.MessageReader.open_stream(pyarrow.memory_map(str(file))):
        if _is_compressed(message.metadata.to_pybytes()):
            raise ValueError(f"{file.name} is compressed, which save_to_disk never does")
    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()


def _is_compressed(metadata: bytes) -> bool:
    """Whether the buffers of an Arrow message are compressed: a small file could unpack to any size.

    The metadata is a flatbuffer (Arrow's format/Message.fbs): a Message with a Schema (1), DictionaryBatch (2) or
    RecordBatch (3). Raises ValueError if it is damaged.
    """
    try:
        message = _follow(metadata, 0)
        kind, header = _find_field(metadata, message, 1), _find_field(metadata, message, 2)
        if kind is None or header is None or metadata[kind] not in (2, 3):
            return False
        batch = _follow(metadata, header)
        if metadata[kind] == 2:
            data = _find_field(metadata, batch, 1)
            if data is None:
                return False
            batch = _follow(metadata, data)
        return _find_field(metadata, batch, 3) is not None
    except (struct.error, IndexError):
        raise ValueError("a damaged message") from None


def _follow(buffer: bytes, at: int) -> int:
    """Return the target of an offset in a flatbuffer."""
    return at + struct.unpack_from("<I", buffer, at)[0]


def _find_field(buffer: bytes, table: int, number: int) -> int | None:
    """Return the position of a field of a table in a flatbuffer; None if it has the default."""
    vtable = table - struct.unpack_from("<i", buffer, table)[0]
    if vtable < 0 or 4 + 2 * number >= struct.unpack_from("<H", buffer, vtable)[0]:
        return None
    place = struct.unpack_from("<H", buffer, vtable + 4 + 2 * number)[0]
    return table + place if place else None


def _check_complete(file: Path) -> None:
    # pyarrow reads a stream that lacks its last batches without an error.
    with explain_errors(file, "fetch the data set again"), open_regular(file) as stream:
        stream.seek(max(0, stream.seek(0, io.SEEK_END) - len(END_OF_STREAM)))
        if stream.read() != END_OF_STREAM:
            raise UserError(f"{file}: cut short, or damaged; fetch it again")


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is text or a list of text. Types with shared values may grow to many times their file."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)


class ArrowImages:
    """Images in a column of a saved data set, read on access.

    Args:
        folder: folder of the data set.
        column: name of the column.
        contents: the column. Forked processes share it; others open the files at their first read.
        rows: int64 (images,), the row of each image.
        sizes: int64 (images,), bytes of each image in its row.
        is_base64: whether the rows hold base64.
    """

    def __init__(
        self, folder: Path, column: str, contents: Contents, rows: np.ndarray, sizes: np.ndarray, is_base64: bool
    ):
        self.folder = folder
        self.column = column
        self.rows = rows
        self.sizes = sizes
        self.is_base64 = is_base64
        self._contents: Contents | None = contents
        self._changed = max(file.stat().st_mtime_ns for file in list_data_files(folder))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_contents": None}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        return decode_rgb(io.BytesIO(self.encoded(index)), self.name(index))

    def encoded(self, index: int) -> bytes:
        """The bytes of the image file. Raises UserError, naming the row, if its base64 is invalid."""
        if self._contents is None:
            self._contents = Contents(open_columns(self.folder).column(self.column))
        content = self._contents[int(self.rows[index])]
        check_encoded_size(len(content), self.name(index))
        return decode_base64(bytes(content), self.name(index)) if self.is_base64 else bytes(content)

    def name(self, index: int) -> str:
        return f"{self.folder}, row {self.rows[index]}"

    def key(self, index: int) -> str:
        """Return the number of an image's row."""
        return str(self.rows[index])

    def stamp(self, index: int) -> tuple[int, int]:
        """Size of the row's content in bytes, and time of the files' last change in ns."""
        return int(self.sizes[index]), self._changed


class Contents:
    """The bytes, or UTF-8 text, in each row of a column, as memoryviews that are read from disk on access.

    Args:
        column: a `pyarrow.ChunkedArray` of bytes or texts, of structs with such a field, or of lists of either.
        field: the field to read from structs.

    Attributes:
        field: the field that is read; None if the column has no structs.
        is_text: whether the rows are texts.

    Raises:
        TypeError: the column has another type.
        ValueError: the column is damaged; reading it could end the process.
    """

    def __init__(self, column: Any, field: str = "bytes"):
        from pyarrow import types

        kind = column.type
        self._is_list = types.is_list(kind) or types.is_large_list(kind)
        kind = kind.value_type if self._is_list else kind
        self.field = field if types.is_struct(kind) and kind.get_field_index(field) >= 0 else None
        kind = kind.field(field).type if self.field else kind
        self.is_text = types.is_string(kind) or types.is_large_string(kind)
        if not (self.is_text or types.is_binary(kind) or types.is_large_binary(kind) or types.is_null(kind)):
            raise TypeError(f"holds {column.type}")
        self._parts = [self._find_leaf(chunk) for chunk in column.chunks]
        self._first = np.cumsum([0, *(len(rows) for _, rows in self._parts)]).tolist()

    def _find_leaf(self, chunk: Any) -> tuple[Any, np.ndarray]:
        """Return the bytes or texts of a chunk, and int64 (rows,): the index of each row's one, -1 if none or several.

        Raises ValueError if one lies outside the chunk. Rows of a list or a struct are never built: that would read
        the struct's other fields, which may be damaged.
        """
        import pyarrow

        rows = np.where(_is_null(chunk), -1, np.arange(len(chunk)))
        if self._is_list:
            # Validate the same lists of nulls: validating the lists themselves would read all images.
            lists = pyarrow.LargeListArray if pyarrow.types.is_large_list(chunk.type) else pyarrow.ListArray
            lists.from_arrays(chunk.offsets, pyarrow.nulls(len(chunk.values))).validate(full=True)
            offsets = chunk.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
            rows = np.where((rows >= 0) & (np.diff(offsets) == 1), offsets[:-1], -1)
            chunk = chunk.values
        if self.field:
            null = np.append(_is_null(chunk), True)  # the last one is for row -1
            rows = np.where(null[rows], -1, rows)
            chunk = chunk.field(self.field)
        if not pyarrow.types.is_null(chunk.type):
            large = pyarrow.types.is_large_string(chunk.type) or pyarrow.types.is_large_binary(chunk.type)
            chunk.view(pyarrow.large_binary() if large else pyarrow.binary()).validate(full=True)
        return chunk, rows

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, row: int) -> memoryview:
        """The content of a row; empty if it has none, or several."""
        part = bisect_right(self._first, row) - 1
        leaf, rows = self._parts[part]
        return _read_content(leaf, int(rows[row - self._first[part]]))

    def __iter__(self) -> Iterator[memoryview]:
        for leaf, rows in self._parts:
            for row in rows.tolist():
                yield _read_content(leaf, row)


def _is_null(chunk: Any) -> np.ndarray:
    """bool (rows,)."""
    return chunk.is_null().to_numpy(zero_copy_only=False)


def _read_content(leaf: Any, row: int) -> memoryview:
    """Return the bytes of a row without copying; empty for row -1 and for a null."""
    scalar = leaf[row] if row >= 0 else None
    return memoryview(scalar.as_buffer() if scalar is not None and scalar.is_valid else b"")
