"""SIGINT and SIGTERM in a run."""

import os
import signal

import pytest

from clip_retrieval.signals import StopSignal, ignore_first_signal


@pytest.fixture(autouse=True)
def handlers():
    """Restore the handlers of the test program."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_interrupts_at_the_next_check(number):
    with StopSignal().handle_signals() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            stop.check()
        with pytest.raises(KeyboardInterrupt), stop.interruptible():
            raise AssertionError("interruptible work must not start after a signal")
    os.kill(os.getpid(), number)  # ignored: a stopped run is only ending


def test_handlers_are_restored_without_a_signal():
    before = signal.getsignal(signal.SIGINT)
    with StopSignal().handle_signals():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_interruptible_block_is_interrupted_at_once():
    with StopSignal().handle_signals() as stop, pytest.raises(KeyboardInterrupt), stop.interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal must interrupt")


def test_loader_process_survives_only_the_first_signal():
    child = os.fork()
    if child == 0:
        ignore_first_signal(0)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
