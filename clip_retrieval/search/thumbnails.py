"""Reduced images for the page, made on demand and kept in a bounded cache."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict

from clip_retrieval.data.images.decode import decode_rgb
from clip_retrieval.data.images.photographs import prepare_photo

SIDES = {"small": 480, "large": 1600}
"""The long side of each size, in pixels."""
QUALITY = 85  # of JPEG
CACHE_BYTES = 2**26
DECODERS = 2  # images decoded at a time: each takes up to 4 bytes a pixel


class Thumbnails:
    """JPEG files of the small size in memory, the least recently used ones dropped. Several threads may use it.

    Attributes:
        decoding: to hold while an image is decoded.
    """

    def __init__(self, max_bytes: int = CACHE_BYTES):
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self._free = max_bytes
        self._lock = threading.Lock()
        self.decoding = threading.Semaphore(DECODERS)

    def get(self, path: str, size: str) -> bytes:
        """Return an image of a size as JPEG, without its metadata. Raises UserError if it cannot be read."""
        with self._lock:
            if size == "small" and path in self._cache:
                self._cache.move_to_end(path)
                return self._cache[path]
        with self.decoding:
            content = _reduce(path, SIDES[size])
        if size == "small":
            with self._lock:
                self._keep(path, content)
        return content

    def _keep(self, path: str, content: bytes) -> None:
        if path in self._cache:  # by another thread
            return
        self._cache[path] = content
        self._free -= len(content)
        while self._free < 0:
            self._free += len(self._cache.popitem(last=False)[1])


def _reduce(path: str, side: int) -> bytes:
    image = decode_rgb(path, path, prepare_photo, min_side=side)
    image.thumbnail((side, side))
    target = io.BytesIO()
    image.save(target, "JPEG", quality=QUALITY)
    return target.getvalue()
