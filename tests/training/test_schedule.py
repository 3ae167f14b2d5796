import math

import pytest

from clip_retrieval.training.schedule import learning_rate, warmup_steps


def test_linear_warmup_to_the_peak_then_cosine_to_zero():
    def at(step):
        return learning_rate(step, peak=2.0, warmup_steps=4, total_steps=12)

    assert [at(s) for s in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert at(4) == pytest.approx(2.0)
    assert at(8) == pytest.approx(1.0)
    assert at(10) == pytest.approx(1 + math.cos(math.pi * 0.75))
    assert at(12) == pytest.approx(0.0)


def test_constant_schedule_stays_at_the_peak_after_the_warmup():
    rates = [learning_rate(s, peak=2.0, warmup_steps=4, total_steps=12, schedule="constant") for s in range(12)]
    assert rates == [0.5, 1.0, 1.5] + [2.0] * 9


def test_linear_schedule_falls_to_zero_after_the_warmup():
    rates = [learning_rate(s, peak=2.0, warmup_steps=4, total_steps=12, schedule="linear") for s in range(13)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25, 0.0])


@pytest.mark.parametrize(
    "decay_fraction, rates",
    [
        (0.3, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2 / 3, 1 / 3]),
        (None, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5]),
        (0.95, [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),  # the decay follows the warmup
        (0.01, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_wsd_is_constant_and_falls_in_the_last_fraction(decay_fraction, rates):
    options = {"peak": 1.0, "warmup_steps": 2, "total_steps": 10, "schedule": "wsd", "decay_fraction": decay_fraction}
    assert [learning_rate(s, **options) for s in range(10)] == pytest.approx(rates)


def test_longer_wsd_run_has_the_same_rates_until_the_decay():
    options = {"peak": 1.0, "warmup_steps": 4, "schedule": "wsd"}
    assert learning_rate(75, total_steps=100, **options) == learning_rate(75, total_steps=200, **options)


def test_warmup_is_steps_or_a_fraction_at_most_the_run():
    assert warmup_steps(500, 10_000) == 500
    assert warmup_steps(0.2, 1000) == 200
    assert warmup_steps(500, 30) == 30
    assert warmup_steps(0, 30) == 0


def test_default_warmup_is_500_steps_and_at_most_a_tenth_of_the_run():
    assert [warmup_steps(None, total) for total in (5, 30, 4999, 5000, 10**6)] == [0, 3, 499, 500, 500]


def test_run_without_warmup_starts_at_the_peak():
    assert learning_rate(0, peak=1.0, warmup_steps=0, total_steps=10) == 1.0
    assert learning_rate(29, peak=1.0, warmup_steps=30, total_steps=30) == 1.0
