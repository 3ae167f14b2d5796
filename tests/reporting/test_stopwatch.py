import pytest

from clip_retrieval.reporting import stopwatch
from clip_retrieval.reporting.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set by hand."""
    now = [100.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    return now


def test_pauses_do_not_count(clock):
    watch = Stopwatch(seconds=10)
    clock[0] += 2
    with watch.pause():
        clock[0] += 50
    clock[0] += 4
    watch.count(8)
    assert watch.seconds == 16
    assert watch.lap() == (2, 0)


def test_waiting_is_lost(clock):
    watch = Stopwatch()
    with watch.wait():
        clock[0] += 1
    clock[0] += 3
    watch.count(8)
    assert watch.lap() == (2, 25)
    clock[0] += 1
    watch.count(8)
    assert watch.lap() == (8, 0)


def test_slow_steps_are_lost_to_loading_too(clock):
    watch = Stopwatch()
    watch.step_seconds = 0.5
    for _ in range(2):
        with watch.wait():
            clock[0] += 0.1
        clock[0] += 0.9
        watch.count(4)
    assert watch.lap() == (4, 50)
    clock[0] += 0.4  # faster than measured
    watch.count(4)
    assert watch.lap() == pytest.approx((10, 0))


def test_clock_has_hours_minutes_and_seconds():
    assert [stopwatch.clock(s) for s in (0.9, 59, 3599, 3600, 90061)] == [
        "0:00:00",
        "0:00:59",
        "0:59:59",
        "1:00:00",
        "25:01:01",
    ]
