"""Ctrl-C and SIGTERM, turned into a clean end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Notes that an end was asked for; a run asks at the points where it can stop (`check`).

    Work that can be broken off anywhere, because nothing of it has to be kept, runs in `interruptible`. Processes that
    share a run set `agree`, which says whether any of them was asked: then they stop together, at `check` only.
    """

    def __init__(self) -> None:
        self.agree: Callable[[bool], bool] | None = None
        self._requested = False
        self._interruptible = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Handle SIGINT and SIGTERM in this block; a run that was stopped ignores further ones, as it only ends."""
        before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if self._requested else handler)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block in which a signal raises KeyboardInterrupt at once."""
        if self.agree is not None:
            yield
            return
        self.check()
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if an end was asked for."""
        if self.agree(self._requested) if self.agree else self._requested:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: object) -> None:
        self._requested = True
        if self._interruptible:
            raise KeyboardInterrupt


def ignore_stop_signals() -> None:
    """Ignore SIGINT and SIGTERM from here on: the program is complete, and its process only ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def ignore_first_signal(worker: int) -> None:
    """For loader processes: a signal to the whole process group reaches them too, but their parent decides.

    A second SIGTERM, which is what the parent sends to one that does not end by itself, ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
