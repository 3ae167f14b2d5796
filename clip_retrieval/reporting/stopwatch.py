"""The time that training takes, and the share of it spent waiting for data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """The seconds of a run's training, its speed and its wait for data between two log lines.

    Args:
        seconds: seconds that the run has trained before.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._lap_started = time.perf_counter()
        self._started = self._lap_started - seconds
        self._waited = 0.0
        self._pairs = 0

    @property
    def seconds(self) -> float:
        """Seconds of training, without the paused ones."""
        return time.perf_counter() - self._started

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that waits for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A block that is not training. A new lap starts after it."""
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started
        self._start_lap()

    def count(self, pairs: int) -> None:
        """Count trained pairs."""
        self._pairs += pairs

    def lap(self) -> tuple[float, float]:
        """Return pairs per second, and the percent of time waited for data, since the last lap; start the next."""
        seconds = time.perf_counter() - self._lap_started
        figures = self._pairs / seconds, 100 * self._waited / seconds
        self._start_lap()
        return figures

    def _start_lap(self) -> None:
        self._lap_started, self._waited, self._pairs = time.perf_counter(), 0.0, 0
