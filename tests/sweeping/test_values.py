"""The option values of the runs of a sweep."""

import math

import pytest

from clip_retrieval.command_line import parse
from clip_retrieval.errors import UserError
from clip_retrieval.sweeping.values import ablate, combine, draw, name_run, read_changes, read_values, to_arguments


def test_grid_has_all_combinations_and_the_last_option_varies_fastest():
    runs = combine(read_values(["lr=1e-5,3e-5", "batch-size=128,256"]))
    assert runs == [
        {"lr": lr, "batch_size": size}
        for lr, size in [("1e-5", "128"), ("1e-5", "256"), ("3e-5", "128"), ("3e-5", "256")]
    ]


def test_draws_are_in_their_ranges_distinct_and_reproducible():
    listed = read_values(["lr=log:1e-6:1e-4", "weight_decay=uniform:0:0.3", "warmup=int:4:6", "loss=infonce,siglip"])
    runs = draw(listed, 200, seed=0)
    assert len({name_run(run) for run in runs}) == 200
    assert all(1e-6 <= float(run["lr"]) <= 1e-4 and 0 <= float(run["weight_decay"]) <= 0.3 for run in runs)
    assert {run["warmup"] for run in runs} == {"4", "5", "6"} and {run["loss"] for run in runs} == {"infonce", "siglip"}
    below = sum(math.log10(float(run["lr"])) < -5 for run in runs)
    assert 70 < below < 130  # half of them, by logarithm
    assert draw(listed, 20, seed=0) == runs[:20] != draw(listed, 20, seed=1)


def test_draws_end_when_every_combination_is_found():
    assert len(draw(read_values(["batch_size=4,8", "loss=infonce,siglip"]), 50, seed=0)) == 4


def test_arguments_parse_to_the_values():
    values = {"lr": "1e-5", "freeze_vision": "true", "no_restval": "false", "recall_k": "1 20", "loss": "siglip"}
    typed = parse(to_arguments(values))
    assert typed == {"lr": 1e-5, "freeze_vision": True, "no_restval": False, "recall_k": [1, 20], "loss": "siglip"}


def test_another_spelling_of_an_option_is_the_same_option():
    assert read_values(["num_epochs=1,2"]) == {"epochs": ["1", "2"]}
    with pytest.raises(UserError, match="duplicate"):
        read_values(["epochs=1", "num_epochs=2"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lrr=1"], "no option --lrr; did you mean --lr"),
        (["use_siglip=true"], "no option"),
        (["lr=1e-5,1e-5"], "duplicate"),
        (["lr=1e-5,"], "empty"),
        (["lr"], "empty"),
        (["experiments=a,b"], "cannot differ"),
        (["freeze_vision=yes"], "true and false"),
    ],
)
def test_bad_values_name_the_word(words, message):
    with pytest.raises(UserError, match=message):
        read_values(words)


def test_ablation_has_each_run_plain_and_with_each_change_alone():
    changes = read_changes(["ema=0.99", "trainable=lora lr=1e-3"])
    assert ablate(combine(read_values(["seed=1,2"])), changes) == [
        {"seed": "1"},
        {"seed": "1", "ema": "0.99"},
        {"seed": "1", "trainable": "lora", "lr": "1e-3"},
        {"seed": "2"},
        {"seed": "2", "ema": "0.99"},
        {"seed": "2", "trainable": "lora", "lr": "1e-3"},
    ]
    assert ablate([{"lr": "1"}], [{"lr": "2"}]) == [{"lr": "1"}, {"lr": "2"}]
    assert read_changes(["loss=siglip recall_k=1 20"]) == [{"loss": "siglip", "recall_k": "1 20"}]
    assert name_run({}) == "plain"


def test_a_change_has_one_value_of_each_option():
    for word in ("ema=0.9,0.99", "lr=log:1e-6:1e-4"):
        with pytest.raises(UserError, match="needs one value"):
            read_changes([word])
    with pytest.raises(UserError, match="no option --emma"):
        read_changes(["emma=0.9"])


def test_ranges_need_random_and_two_ends():
    with pytest.raises(UserError, match="--random"):
        combine(read_values(["lr=log:1e-6:1e-4"]))
    for text in ("log:0:1", "uniform:2:1", "int:1:x", "log:1:inf"):
        with pytest.raises(UserError, match="not a range"):
            draw(read_values([f"lr={text}"]), 1, seed=0)


def test_names_of_runs_are_file_names_and_differ():
    assert name_run({"lr": "1e-5", "batch_size": "128"}) == "lr=1e-5_batch_size=128"
    values = ["a/../b", "a b", "a-b", "x" * 400, "x" * 401]
    names = [name_run({"pretrained": value}) for value in values]
    assert len(set(names)) == 5 and all("/" not in name and len(name) < 200 for name in names)
