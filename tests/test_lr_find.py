"""The learning rate finder."""

import math

import numpy as np
import pytest

from clip_retrieval.lr_find import has_diverged, smooth, suggest
from tests.conftest import read_json


def test_smoothed_loss_is_the_weighted_mean_of_the_losses_so_far():
    losses = [3.0, 1.0, 4.0, 1.0, 5.0]
    expected = [np.average(losses[:n], weights=0.9 ** np.arange(n)[::-1]) for n in range(1, 6)]
    assert smooth(losses) == pytest.approx(expected, rel=1e-12)


def test_divergence_is_four_times_the_lowest_or_not_finite():
    assert not has_diverged([1.0] * 20 + [1.5])
    assert has_diverged([1.0] * 20 + [40.0])
    assert has_diverged([1.0, math.nan]) and has_diverged([1.0, math.inf])


def test_suggestion_is_a_tenth_of_the_rate_with_the_lowest_loss():
    rates = np.geomspace(1e-6, 1, 61)
    x = np.log10(rates)
    losses = 5 - 4 / (1 + np.exp(-4 * (x + 4))) + np.exp(3 * (x + 1))  # falls fastest at 1e-4, then rises
    found = suggest(rates.tolist(), losses.tolist())
    assert found.lowest == rates[losses.argmin()] and found.tenth == found.lowest / 10
    assert found.steepest == pytest.approx(1e-4, rel=0.3)


def test_a_loss_that_does_not_fall_has_no_suggestion():
    rates = np.geomspace(1e-6, 1, 20).tolist()
    assert suggest(rates, np.linspace(3, 4, 20).tolist()) is None
    assert suggest(rates[:1], [math.nan]) is None


def test_a_collapse_to_equal_features_is_no_fall():
    rates, chance = np.geomspace(1e-6, 10, 20).tolist(), math.log(10)
    collapse = np.maximum(np.linspace(4, 1, 20), chance)
    assert suggest(rates, collapse.tolist(), chance) is None
    assert suggest(rates, (collapse - 0.1).tolist(), chance) is not None
    assert suggest(rates, collapse.tolist()) is not None  # of a loss that has no such value


@pytest.mark.parametrize("kind, optimizer", [("svg", "lion"), ("png", "muon")])
def test_lr_find_writes_curve_and_json_and_no_run(script, arguments, tmp_path, kind, optimizer):
    out_file = tmp_path / "curves" / f"lr.{kind}"
    own = ("--min_lr", "1e-5", "--max_lr", "1", "--steps", "12", "--output", out_file, "--optimizer", optimizer)
    code, _, err = script("lr_find", *arguments, *own)
    assert code == 0, err
    record = read_json(out_file.with_suffix(".json"))
    assert record["lr"] == pytest.approx(np.geomspace(1e-5, 1, 12)[: len(record["lr"])].tolist())
    assert len(record["loss"]) == len(record["lr"]) and record["smoothed_loss"] == pytest.approx(smooth(record["loss"]))
    assert out_file.stat().st_size > 1000 and not (tmp_path / "logs").exists()


def test_lr_find_stops_when_the_loss_diverges(script, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("clip_retrieval.lr_find.DIVERGED", 1.0)  # at the first rise
    monkeypatch.setattr("clip_retrieval.lr_find.smooth", lambda losses: [abs(i - 3) + 1.0 for i in range(len(losses))])
    code, _, err = script("lr_find", *arguments, "--steps", "30", "--output", tmp_path / "lr.svg")
    assert code == 0, err
    record = read_json(tmp_path / "lr.json")
    assert record["diverged"] and len(record["lr"]) == 5


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (("--min_lr", "1", "--max_lr", "0.1"), "--min_lr"),
        (("--steps", "3"), "--steps 3"),
        (("--output", "curve.txt"), ".svg or .png"),
        (("--eval",), "--eval"),
    ],
)
def test_lr_find_refuses_bad_options(script, arguments, own, message):
    code, _, err = script("lr_find", *arguments, *own)
    assert code == 2 and message in err
