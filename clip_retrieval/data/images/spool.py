"""A temporary file for images that can be read only once."""

from __future__ import annotations

import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

from clip_retrieval.files import named_errors

_open: list[Any] = []  # the files live as long as the process


class Spool:
    """Bytes in a file of the temporary folder (TMPDIR). On Linux it has no name: a killed process leaves nothing.

    Attributes:
        path: the file, for this process and its loader processes.
    """

    def __init__(self) -> None:
        with named_errors(tempfile.gettempdir()):
            if Path(f"/proc/{os.getpid()}/fd").is_dir():
                self._file: Any = tempfile.TemporaryFile()  # noqa: SIM115  kept open
                self.path = Path(f"/proc/{os.getpid()}/fd/{self._file.fileno()}")
            else:
                self._file = tempfile.NamedTemporaryFile(prefix="clip_retrieval-")  # noqa: SIM115  kept open
                self.path = Path(self._file.name)
        _open.append(self._file)
        self._size = self._checksum = 0

    def add(self, content: bytes) -> int:
        """Append bytes, and return their position. Raises OSError if the disk is full."""
        with named_errors(tempfile.gettempdir()):
            self._file.write(content)
        self._checksum = zlib.crc32(content, self._checksum)
        self._size += len(content)
        return self._size - len(content)

    def finish(self) -> None:
        """Write everything to the file. Its time of change becomes a checksum: caches know equal content by it."""
        with named_errors(tempfile.gettempdir()):
            self._file.flush()
        os.utime(self.path, ns=(self._checksum, self._checksum))
