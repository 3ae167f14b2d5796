"""The time that training takes, and the share of it lost to loading."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """The seconds of a run's training, its speed and the time lost to loading between two log lines.

    Args:
        seconds: seconds that the run has trained before.

    Attributes:
        step_seconds: seconds of a step that has its data. Further time counts as lost: loading processes slow down
            the process that launches the steps. None: only waiting counts.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.step_seconds: float | None = None
        self._lap_started = time.perf_counter()
        self._started = self._lap_started - seconds
        self._waited = 0.0
        self._pairs = 0
        self._steps = 0

    @property
    def seconds(self) -> float:
        """Seconds of training, without the paused ones."""
        return time.perf_counter() - self._started

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """A block that waits for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """A block that is not training. A new lap starts after it."""
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started
        self._start_lap()

    def count(self, pairs: int) -> None:
        """Count a step and its pairs."""
        self._pairs += pairs
        self._steps += 1

    def lap(self) -> tuple[float, float]:
        """Return pairs per second, and the percent of time lost to loading, since the last lap; start the next."""
        seconds = time.perf_counter() - self._lap_started
        lost = self._waited
        if self.step_seconds is not None:
            lost = max(lost, seconds - self._steps * self.step_seconds)
        figures = self._pairs / seconds, 100 * lost / seconds
        self._start_lap()
        return figures

    def _start_lap(self) -> None:
        self._lap_started, self._waited, self._pairs, self._steps = time.perf_counter(), 0.0, 0, 0


def clock(seconds: float) -> str:
    """Return seconds as hours:minutes:seconds, rounded down."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
