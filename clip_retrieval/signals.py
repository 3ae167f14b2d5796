"""A clean end on Ctrl-C and SIGTERM: `finetune.finetune` saves last.pt, and the program exits with code 130."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Records a stop signal; a run calls `check` at the points where it can stop.

    Work without results to save runs in `interruptible` and stops anywhere. Processes that share a run set `agree`,
    which returns whether any of them received a signal: they stop together, at `check` only.
    """

    def __init__(self) -> None:
        self.agree: Callable[[bool], bool] | None = None
        self._requested = False
        self._interruptible = False

    @contextlib.contextmanager
    def handle_signals(self) -> Iterator[StopSignal]:
        """Handle SIGINT and SIGTERM in this block. After a stop, ignore them outside too: the program is exiting."""
        before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if self._requested else handler)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise KeyboardInterrupt in this block as soon as a signal arrives, unless processes stop together."""
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
        """Raise KeyboardInterrupt if a stop was requested."""
        requested = self._requested if self.agree is None else self.agree(self._requested)
        if requested:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: object) -> None:
        self._requested = True
        if self._interruptible:
            raise KeyboardInterrupt


def ignore_stop_signals() -> None:
    """Ignore SIGINT and SIGTERM from now on: the program is complete, and its process exits."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def ignore_first_signal(worker: int) -> None:
    """Ignore the first SIGTERM, and every SIGINT, in a loader worker: its parent decides when to stop.

    A signal to the process group reaches the workers too. The second SIGTERM, which the parent sends to a worker that
    does not exit, ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
