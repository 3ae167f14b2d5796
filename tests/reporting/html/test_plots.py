"""The figures follow the page's colours, carry labels, and draw the values of the metrics log."""

import json
import re

import pytest

from clip_retrieval.reporting.html.plots import draw_plots, draw_training
from clip_retrieval.reporting.html.svg import VARIABLES
from clip_retrieval.reporting.html.write import read_metrics
from tests.reporting.html.conftest import make_run


def test_figures_are_labelled_and_have_no_styles_or_fixed_colours(photos):
    plots = draw_plots(make_run(photos, 0.8).measure(), None, ("run", ""))
    assert [plot.title for plot in plots] == ["Recall over K", "Ranks", "Similarity"]
    for plot in plots:
        assert re.match(r'<svg viewBox="[\d. ]+" role="img" aria-label="[^"]+"><title>[^<]+</title>', plot.svg)
        assert "style=" not in plot.svg and "currentColor" in plot.svg and "var(--series-1)" in plot.svg
        assert not any(color in plot.svg for color in VARIABLES)
        assert set(re.findall(r"#[0-9a-f]{6}\b", plot.svg)) <= {"#000000"}


def test_ids_of_two_figures_differ(photos):
    plots = draw_plots(make_run(photos, 0.8).measure(), None, ("run", ""))
    ids = [name for plot in plots for name in re.findall(r'\bid="([^"]+)"', plot.svg)]
    assert ids and len(set(ids)) == len(ids)


def test_both_runs_are_drawn_with_escaped_names(photos):
    measured = make_run(photos, 0.8).measure()
    recall = draw_plots(measured, measured, ("<a> $x$", 'style="b" id="text_1"'))[0].svg
    assert "image to text, &lt;a&gt; $x$" in recall and 'text to image, style="b" id="text_1"' in recall


def test_training_curves_skip_damaged_values(tmp_path):
    records = [{"kind": "train", "step": s, "loss": 5 - s, "lr": 1e-3} for s in range(3)]
    records += [{"kind": "train", "step": 3, "loss": float("nan")}, {"kind": "train", "step": "x", "loss": 1}, ["list"]]
    records += [{"kind": "val", "step": 2, "loss": 4.0, "i2t": {"R@1": 10.0}, "t2i": {"R@1": "high"}}, {"kind": "val"}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "tra\n')
    plots = draw_training(list(read_metrics(path)))
    assert [plot.title for plot in plots] == ["Loss", "R@1 on val, %", "Learning rate"]
    assert "nan" not in plots[0].svg.lower()
    assert draw_training([]) == [] and list(read_metrics(tmp_path / "missing.jsonl")) == []


def test_averages_and_retention_are_curves_of_runs_that_have_them():
    records = [{"kind": kind, "step": s, "rsum": 10.0 * s} for s in range(3) for kind in ("val", "retention")]
    assert [plot.title for plot in draw_training(records)] == ["rsum on the data to retain"]
    records += [{"kind": "val_ema", "step": s, "rsum": 20.0 * s} for s in range(3)]
    records += [{"kind": "zero_shot", "step": s, "top1": 5.0} for s in range(3)]
    plots = {plot.title: plot.svg for plot in draw_training(records)}
    assert list(plots) == ["rsum on val", "rsum on the data to retain", "Zero-shot top-1, %"]
    assert "EMA" in plots["rsum on val"] and "EMA" not in plots["rsum on the data to retain"]


@pytest.mark.parametrize("count", [3, 50_000])
def test_long_runs_make_small_figures(count):
    records = [{"kind": "train", "step": step, "loss": (step * 7919) % 101} for step in range(count)]
    assert len(draw_training(records)[0].svg) < 80_000
