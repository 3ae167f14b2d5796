"""The index of a running server: a new one replaces it when it is updated, and FAISS is added in the background."""

from __future__ import annotations

import threading
from pathlib import Path

from clip_retrieval.errors import NotFiniteError, UserError
from clip_retrieval.log import log
from clip_retrieval.search.index import INDEX
from clip_retrieval.search.query import Gallery

SECONDS = 2.0
"""Time between two checks of the index."""


class Watcher(threading.Thread):
    """Replaces `gallery` when its index changes on disk. Requests take the attribute once and keep that gallery.

    Attributes:
        gallery: the newest one that could be opened.
    """

    def __init__(self, gallery: Gallery, faiss: bool | None = None, seconds: float = SECONDS):
        """faiss: see `approximate.is_wanted`. seconds: between two checks of the index."""
        super().__init__(daemon=True)
        self.gallery = gallery
        self._faiss = faiss
        self._seconds = seconds
        self._stamp = _stamp(gallery.folder)
        self._ended = threading.Event()

    def run(self) -> None:
        self._accelerate(self.gallery)  # exact until it is built
        while not self._ended.wait(self._seconds):
            self.check()

    def end(self) -> None:
        """End the thread when it has finished its work."""
        self._ended.set()

    def check(self) -> None:
        """Open the index if it has changed. If that fails, the gallery stays as it is, with a line in the log."""
        stamp = _stamp(self.gallery.folder)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            gallery = self.gallery.reopen()
        except (UserError, OSError) as error:
            log.warning(f"the index has changed, but cannot be used: {error}; the page shows it as it was")
            return
        log.info(f"the index was updated: {len(gallery.entries):,} images")
        self.gallery = gallery
        self._accelerate(gallery)

    def _accelerate(self, gallery: Gallery) -> None:
        try:
            gallery.accelerate(self._faiss)
        except (UserError, NotFiniteError, MemoryError) as error:
            log.warning(f"exact search: {error}")


def _stamp(folder: Path) -> tuple[int, int, int] | None:
    """A stamp of the index, which changes when it is replaced; None while there is none."""
    try:
        found = (folder / INDEX).stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
