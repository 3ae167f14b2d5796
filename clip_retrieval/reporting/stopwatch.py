"""Training speed and time spent waiting for data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Measures the speed, and the share of time spent waiting for data, between two log lines."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._waited = 0.0
        self._pairs = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time a block that waits for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    def count(self, pairs: int) -> None:
        """Add `pairs` trained pairs."""
        self._pairs += pairs

    def lap(self) -> tuple[float, float]:
        """Return pairs per second and percent of time waited since the last lap, and start the next lap."""
        now = time.perf_counter()
        seconds = now - self._started
        speed, waited = self._pairs / seconds, 100 * self._waited / seconds
        self._started, self._waited, self._pairs = now, 0.0, 0
        return speed, waited
