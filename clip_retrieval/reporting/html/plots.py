"""The figures of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from clip_retrieval.evaluation.metrics import recall_at
from clip_retrieval.reporting.html.measure import Measured
from clip_retrieval.reporting.html.svg import SERIES, draw_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIRECTIONS = {"i2t": "image to text", "t2i": "text to image"}
RECALL_K = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
RANK_BINS = (1, 2, 6, 11, 51, 101, 501)  # first rank of each bin
MOST_POINTS = 1000  # of a line
AVERAGES = {"": "weights", "_ema": "EMA", "_swa": "SWA"}
LARGEST = 1e30  # value to draw


@dataclass(frozen=True)
class Plot:
    """A figure with its title and a sentence about it."""

    title: str
    svg: Markup
    note: str = ""


def draw_plots(measured: Measured, other: Measured | None, names: tuple[str, str]) -> list[Plot]:
    """Draw recall over K, the rank histogram and the similarities. names: of this run and of the other one."""
    runs = [(names[0], measured)] + ([(names[1], other)] if other else [])
    return [_draw_recall(runs), _draw_ranks(measured), _draw_similarities(measured)]


def _draw_recall(runs: Sequence[tuple[str, Measured]]) -> Plot:
    ks = [k for k in RECALL_K if k <= max(10, max(len(runs[0][1].i2t.rank), len(runs[0][1].t2i.rank)))]

    def draw(axes: Axes) -> None:
        for (run, measured), dashes in zip(runs, ("-", (0, (3, 2)))):
            for name, color in zip(DIRECTIONS, SERIES):
                label = DIRECTIONS[name] + (f", {run[:24]}" if len(runs) > 1 else "")
                recalls = [recall_at(getattr(measured, name).ranks, k) for k in ks]
                axes.plot(ks, recalls, color=color, linestyle=dashes, label=label)
        axes.set_xscale("log")
        axes.set_xticks([k for k in (1, 2, 5, 10, 20, 50, 100) if k <= ks[-1]], minor=False)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xlim(ks[0], ks[-1])
        axes.set_ylim(bottom=0)
        axes.set(xlabel="K", ylabel="recall@K, %")
        axes.legend()

    return Plot("Recall over K", draw_svg(draw, "Line plot of recall at K against K for both directions"))


def _draw_ranks(measured: Measured) -> Plot:
    highest = max(measured.i2t.rank.max(), measured.t2i.rank.max())
    firsts = [first for first in RANK_BINS if first == 1 or first <= highest]
    lasts = [*(first - 1 for first in firsts[1:]), None]
    labels = [
        f"{first}+" if last is None and first > 1 else f"{first}" if last in (first, None) else f"{first}–{last}"
        for first, last in zip(firsts, lasts)
    ]

    def draw(axes: Axes) -> None:
        width = 0.4
        for offset, (name, color) in enumerate(zip(DIRECTIONS, SERIES)):
            rank = getattr(measured, name).rank
            counts = np.histogram(rank, [*firsts, math.inf])[0]
            places = np.arange(len(firsts)) + (offset - 0.5) * width
            axes.bar(places, 100 * counts / len(rank), width * 0.92, color=color, label=DIRECTIONS[name])
        axes.set_xticks(range(len(firsts)), labels, fontsize=8.5)
        axes.grid(visible=False, axis="x")
        axes.set(xlabel="rank of the first relevant item", ylabel="queries, %")
        axes.legend()

    return Plot("Ranks", draw_svg(draw, "Histogram of the ranks of the first relevant item for both directions"))


def _draw_similarities(measured: Measured) -> Plot:
    hardest = np.concatenate([measured.i2t.hardest, measured.t2i.hardest])
    groups = {
        "matching pairs": measured.positives,
        "hardest negatives": hardest[np.isfinite(hardest)],
        "random negatives": measured.negatives,
    }
    groups = {name: values for name, values in groups.items() if len(values)}
    low, high = min(v.min() for v in groups.values()), max(v.max() for v in groups.values())
    bins = np.linspace(low, high + 1e-6, 60)

    def draw(axes: Axes) -> None:
        for (name, values), color in zip(groups.items(), SERIES):
            shares = 100 * np.histogram(values, bins)[0] / len(values)
            axes.stairs(shares, bins, fill=True, color=color, alpha=0.18)
            axes.stairs(shares, bins, color=color, linewidth=1.6, label=name)
        axes.set(xlabel="cosine similarity", ylabel="pairs, %")
        axes.legend()

    note = "Hardest negatives: the most similar non-matching item of each query."
    return Plot("Similarity", draw_svg(draw, "Histograms of the cosines of matching and of other pairs"), note)


def draw_training(records: Sequence[dict[str, Any]]) -> list[Plot]:
    """Draw the loss, the recall on the val split and the learning rate from the lines of metrics.jsonl.

    Runs with averages (--ema, --swa_start) also have their rsum on val, and those with --retention_dataset or
    --zero_shot_eval the scores on these data. Plots without a value are left out, and values that are not finite
    numbers are skipped.
    """
    wanted: dict[str, dict[str, tuple[str, ...]]] = {
        "Loss": {"training": ("train", "loss"), "val": ("val", "loss")},
        "R@1 on val, %": {DIRECTIONS[d]: ("val", d, "R@1") for d in DIRECTIONS},
        "rsum on val": {label: (f"val{suffix}", "rsum") for suffix, label in AVERAGES.items()},
        "rsum on the data to retain": {label: (f"retention{suffix}", "rsum") for suffix, label in AVERAGES.items()},
        "Zero-shot top-1, %": {label: (f"zero_shot{suffix}", "top1") for suffix, label in AVERAGES.items()},
        "Learning rate": {"learning rate": ("train", "lr")},
    }
    plots = []
    for title, series in wanted.items():
        lines = {label: _read_series(records, *path) for label, path in series.items()}
        lines = {label: points for label, points in lines.items() if points}
        if lines and (title != "rsum on val" or len(lines) > 1):  # without averages, R@1 tells as much
            draw = _line_drawer(lines)
            plots.append(Plot(title, draw_svg(draw, f"Line plot of {title} over the steps of the training")))
    return plots


def _read_series(records: Sequence[dict[str, Any]], kind: str, *path: str) -> list[tuple[float, float]]:
    """The (step, value) points of one kind of record; at most about MOST_POINTS."""
    points: list[tuple[float, float]] = []
    for record in records:
        value: Any = record if record.get("kind") == kind else None
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        step = record.get("step")
        if all(isinstance(number, (int, float)) and abs(number) < LARGEST for number in (step, value)):
            points.append((float(step), float(value)))  # type: ignore[arg-type]
    stride = max(1, len(points) // MOST_POINTS)
    return points[:-1:stride] + points[-1:]


def _line_drawer(lines: dict[str, list[tuple[float, float]]]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for (label, points), color in zip(lines.items(), SERIES):
            steps, values = zip(*points)
            axes.plot(steps, values, color=color, label=label, marker="o" if len(points) <= 12 else None, markersize=4)
        axes.set_xlabel("step")
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        if len(lines) > 1:
            axes.legend()

    return draw
