"""Where the time of training goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Speed, and the share of time spent waiting for data, between two log lines."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._waited = 0.0
        self._pairs = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that waits for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    def count(self, pairs: int) -> None:
        """`pairs` more are done."""
        self._pairs += pairs

    def lap(self) -> tuple[float, float]:
        """Pairs per second and percent of time waited since the last lap; starts the next."""
        now = time.perf_counter()
        seconds = now - self._started
        figures = self._pairs / seconds, 100 * self._waited / seconds
        self._started, self._waited, self._pairs = now, 0.0, 0
        return figures
