"""Columns of a Hugging Face data set that `save_to_disk` wrote: a folder of Arrow files, memory-mapped.

    DIR/state.json, DIR/dataset_info.json, DIR/data-00000-of-00004.arrow, ...

Nothing in the folder is run. An image stands there as the library keeps it (its bytes, or its path), as plain bytes,
as a base64 text, as a list with one of these, or as a path.
"""

from __future__ import annotations

import io
import json
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_retrieval.data.base64_images import decoded
from clip_retrieval.data.decode import decode_rgb
from clip_retrieval.errors import UserError

STATE = "state.json"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # what an Arrow stream ends with when all of it was written


def is_saved(folder: Path) -> bool:
    """Whether a data set, or one split of it, was saved in `folder`."""
    return (folder / STATE).is_file()


def open_saved(folder: Path) -> Any:
    """The table of a saved data set, a `pyarrow.Table` that is read from the disk where it is looked at.

    Raises UserError where the library is not installed, or a file is missing or damaged.
    """
    datasets = _library()
    for file in data_files(folder):
        _check_whole(file)
    try:
        table = datasets.load_from_disk(str(folder), keep_in_memory=False).data.table
        table.validate()
    # pyarrow's errors are OSError and ValueError; the library's own JSON may lack anything.
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: not a data set that save_to_disk wrote ({reason}); save it anew") from None
    return table


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        datasets = None
    # The folder `datasets` of a clone is imported as an empty package.
    if not hasattr(datasets, "load_from_disk"):
        raise UserError("Hugging Face data sets need the library datasets: pip install datasets")
    return datasets


def data_files(folder: Path) -> list[Path]:
    """The Arrow files of a saved data set. Raises UserError where its state.json does not name them."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / STATE}: not as save_to_disk writes it ({error!r}); save the data set anew"
        ) from None


def _check_whole(file: Path) -> None:
    # Without its last batches a stream is read without an error.
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, io.SEEK_END) - len(END_OF_STREAM)))
            whole = stream.read() == END_OF_STREAM
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); fetch the data set again") from None
    if not whole:
        raise UserError(f"{file}: cut short, or damaged; fetch it again")


class SavedImages:
    """Images in a column of a saved data set, read when asked for.

    Args:
        folder: where the data set was saved.
        column: the column.
        contents: what it holds. Forked processes share it, others open the files when they first read.
        rows: int64 (images,), the row of each image.
        sizes: int64 (images,), bytes that it takes there.
        is_base64: they stand there as base64.
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
        self._changed = max(file.stat().st_mtime_ns for file in data_files(folder))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_contents": None}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        return decode_rgb(io.BytesIO(self.encoded(index)), self.name(index))

    def encoded(self, index: int) -> bytes:
        """The bytes of the image file. Raises UserError, naming the row, where they are no base64."""
        if self._contents is None:
            self._contents = Contents(open_saved(self.folder).column(self.column))
        content = bytes(self._contents[int(self.rows[index])])
        return decoded(content, self.name(index)) if self.is_base64 else content

    def name(self, index: int) -> str:
        return f"{self.folder}, row {self.rows[index]}"

    def stamp(self, index: int) -> tuple[int, int]:
        """Size in bytes of what stands in the row, and time of the files' last change (ns)."""
        return int(self.sizes[index]), self._changed


class Contents:
    """The bytes, or the text as UTF-8, in each row of a column: memoryviews that are read where they are looked at.

    Args:
        column: a `pyarrow.ChunkedArray` of bytes or texts, structs with a field of these, or lists of either.
        field: the field of structs.

    Attributes:
        field: the field that is looked at; None where there are no structs.
        is_text: these are texts.

    Raises:
        TypeError: the column is none of this.
        ValueError: it is damaged: reading it could end the process.
    """

    def __init__(self, column: Any, field: str = "bytes"):
        from pyarrow import types

        self._chunks = column.chunks
        self._first = np.cumsum([0, *(len(chunk) for chunk in self._chunks)]).tolist()
        kind = column.type
        self._is_list = types.is_list(kind) or types.is_large_list(kind)
        kind = kind.value_type if self._is_list else kind
        self.field = field if types.is_struct(kind) and kind.get_field_index(field) >= 0 else None
        kind = kind.field(field).type if self.field else kind
        self.is_text = types.is_string(kind) or types.is_large_string(kind)
        if not (self.is_text or types.is_binary(kind) or types.is_large_binary(kind) or types.is_null(kind)):
            raise TypeError(f"holds {column.type}")
        for chunk in self._chunks:
            self._check_offsets(chunk)

    def _check_offsets(self, chunk: Any) -> None:
        """Raise ValueError where a row lies outside the chunk. What is in the rows is not read."""
        import pyarrow

        if self._is_list:
            # Lists of nothing, as long as these are: all of a list of images would be read.
            lists = pyarrow.LargeListArray if pyarrow.types.is_large_list(chunk.type) else pyarrow.ListArray
            lists.from_arrays(chunk.offsets, pyarrow.nulls(len(chunk.values))).validate(full=True)
            chunk = chunk.values
        chunk = chunk.field(self.field) if self.field else chunk
        if not pyarrow.types.is_null(chunk.type):
            large = pyarrow.types.is_large_string(chunk.type) or pyarrow.types.is_large_binary(chunk.type)
            chunk.view(pyarrow.large_binary() if large else pyarrow.binary()).validate(full=True)

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, row: int) -> memoryview:
        """Empty where there is nothing, or several."""
        chunk = bisect_right(self._first, row) - 1
        return self._content(self._chunks[chunk][row - self._first[chunk]])

    def __iter__(self) -> Iterator[memoryview]:
        for chunk in self._chunks:
            yield from map(self._content, chunk)

    def _content(self, scalar: Any) -> memoryview:
        if self._is_list and scalar.is_valid:
            if len(scalar) != 1:
                return memoryview(b"")
            scalar = scalar[0]
        if self.field and scalar.is_valid:
            scalar = scalar[self.field]
        return memoryview(scalar.as_buffer() if scalar.is_valid else b"")
