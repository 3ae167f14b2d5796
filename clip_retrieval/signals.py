"""Ctrl-C and SIGTERM, turned into a clean end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class StopSignal:
    """Interrupts what can be broken off at any point; within `deferred`, it only notes that an end was asked for.

    A second signal interrupts at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferring = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopSignal]:
        """Handle SIGINT and SIGTERM in this block."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A block that must not be broken off; afterwards, a noted signal interrupts."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.requested:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: object) -> None:
        again, self.requested = self.requested, True
        if again or not self._deferring:
            raise KeyboardInterrupt


def outlive_first_signal(worker: int) -> None:
    """For loader processes: a signal to the whole process group reaches them too, but their parent decides.

    A second SIGTERM, which is what the parent sends to one that does not end by itself, ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
