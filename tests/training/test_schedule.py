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
