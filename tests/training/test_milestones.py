"""The steps at which a run logs, saves and evaluates."""

import pytest

from clip_retrieval.run.merge import settle
from clip_retrieval.training.schedule import Schedule


@pytest.mark.parametrize(
    "options, due",
    [
        ({}, {"is_milestone": [4, 8, 10], "evaluates": [4, 8, 10], "evaluates_zero_shot": [4, 8, 10]}),
        ({"eval_every": 0}, {"is_milestone": [4, 8, 10], "evaluates": [10], "evaluates_zero_shot": [10]}),
        ({"eval_every": 2, "eval_steps": 3}, {"is_milestone": [3, 4, 6, 8, 9, 10], "evaluates": [3, 6, 8, 9, 10]}),
        ({"zero_shot_steps": 5}, {"is_milestone": [4, 5, 8, 10], "evaluates_zero_shot": [5, 10]}),
        ({"keep_every": 2, "keep_steps": 7}, {"is_milestone": [4, 7, 8, 10], "keeps_epoch": [8], "keeps_step": [7]}),
        ({"display": 4, "save_every": 3}, {"logs": [4, 8, 10], "saves": [3, 6, 9], "is_milestone": [4, 8, 10]}),
    ],
)
def test_schedule_of_steps(options, due):
    zero_shot = {"zero_shot_eval": "cifar10"} if "zero_shot_steps" in options else {}
    schedule = Schedule.from_options(settle({"max_steps": 10, **zero_shot, **options}), steps_per_epoch=4)
    for predicate, steps in due.items():
        assert [step for step in range(1, 11) if getattr(schedule, predicate)(step)] == steps, predicate


def test_length_is_in_epochs_or_steps():
    assert Schedule.from_options(settle({"epochs": 3}), 4).total_steps == 12
    assert Schedule.from_options(settle({"epochs": 3, "max_steps": 5}), 4).total_steps == 5
