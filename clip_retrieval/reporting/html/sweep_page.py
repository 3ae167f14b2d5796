"""The page of a sweep: a parallel-coordinates figure, and its table."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from clip_retrieval.errors import printable
from clip_retrieval.reporting.html.svg import GRID, SERIES, draw_svg
from clip_retrieval.reporting.html.template import render_template
from clip_retrieval.reporting.table import Row, format_cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST_LABEL = 18  # characters
MOST_TICKS = 12  # values of a text option


def render_sweep(
    title: str, rows: Sequence[Row], columns: Sequence[str], sort: str, note: str, means: Sequence[Row] = ()
) -> str:
    """Render the page of the rows, which are sorted; `sort` is the column of the last axis of the figure.

    Options come first in `columns`, up to the first metric. Runs without a result are only in the table. `means` are
    the rows of a table above it, all with the same columns.
    """
    complete = [row for row in rows if row[sort] is not None]
    options = list(columns[: columns.index("val rsum")])
    figure = draw_parallel(complete, [*options, sort], sort) if complete else None
    tables = [
        (names, [[printable(format_cell(name, row[name])) for name in names] for row in group])
        for names, group in ((list(means[0]) if means else [], means), (columns, rows))
        if group
    ]
    return render_template("sweep.html", None, title=printable(title), tables=tables, figure=figure, note=note)


def draw_parallel(rows: Sequence[Row], axes_names: Sequence[str], sort: str) -> Markup:
    """Draw each run as a line through its values; the best run by the column `sort` is drawn last, and thick."""
    scales = {name: _scale([row[name] for row in rows]) for name in axes_names}
    best = max(rows, key=lambda row: float(row[sort] or 0))

    def draw(axes: Axes) -> None:
        for x, name in enumerate(axes_names):
            axes.axvline(x, color=GRID, linewidth=1.2, zorder=1)
            for text, y in scales[name][1]:
                above = 9 if y >= 0.5 else -9  # where the fewest lines are
                axes.annotate(text, (x, y), (3, above), textcoords="offset points", va="center", fontsize=9)
        for row in [*(row for row in rows if row is not best), best]:
            heights = [scales[name][0][row[name]] for name in axes_names]
            color, width, alpha = (SERIES[1], 3, 1) if row is best else (SERIES[0], 1.4, 0.55)
            axes.plot(range(len(heights)), heights, color=color, linewidth=width, alpha=alpha, zorder=2)
        axes.set_xticks(range(len(axes_names)), [_label(name) for name in axes_names])
        axes.set_yticks([])
        axes.set_ylim(-0.08, 1.08)
        axes.set_xlim(-0.1, len(axes_names) - 0.5)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.grid(False)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page has other fonts
        return draw_svg(draw, f"Parallel coordinates of {len(rows)} runs", (max(4.6, 1.7 * len(axes_names)), 4.2))


def _scale(values: Sequence[str | float | None]) -> tuple[dict[str | float | None, float], list[tuple[str, float]]]:
    """Return the height of each value, in 0 to 1, and the (text, height) of the ticks.

    Numbers are spaced by size, or by logarithm if they span more than a factor of ten; texts are spaced evenly.
    """
    distinct = list(dict.fromkeys(values))
    try:
        numbers = {value: float(value) for value in distinct if value is not None}
        if len(numbers) < len(distinct) or not all(map(math.isfinite, numbers.values())):
            raise ValueError
    except ValueError:
        ordered = sorted(distinct, key=str)
        heights = {value: i / max(1, len(ordered) - 1) for i, value in enumerate(ordered)}
        ticks = ordered if len(ordered) <= MOST_TICKS else [ordered[0], ordered[-1]]
        return heights, [(_label(value), heights[value]) for value in ticks]
    low, high = min(numbers.values()), max(numbers.values())
    if low > 0 and high > 10 * low:
        numbers = {value: math.log(number) for value, number in numbers.items()}
        low, high = math.log(low), math.log(high)
    heights = {value: (number - low) / (high - low) if high > low else 0.5 for value, number in numbers.items()}
    ordered = sorted(distinct, key=lambda value: heights[value])
    ticks = ordered if len(ordered) <= 6 else [ordered[0], ordered[-1]]
    return heights, [(_label(value), heights[value]) for value in ticks]


def _label(value: str | float | None) -> str:
    text = f"{value:.2f}" if isinstance(value, float) else printable(str(value)).replace('"', "'")
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"
