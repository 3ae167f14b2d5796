"""Render a report: one HTML page that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clip_retrieval.data.dataset import Images
from clip_retrieval.reporting.html.collect import Facts
from clip_retrieval.reporting.html.plots import DIRECTIONS, Plot
from clip_retrieval.reporting.html.template import render_template
from clip_retrieval.reporting.html.thumbnails import Thumbnails

BOTH = ("mean_recall", "rsum")
GROUPS = {
    "won": "won",
    "lost": "lost",
    "worst": "worst",
    "best": "best",
    "random": "random sample",
    "judged": "right by ECCV Caption",
}


@dataclass(frozen=True)
class Page:
    """The content of a report.

    Attributes:
        title, subtitle: the heading.
        about: (name, value) lines about the model, the data and the report.
        warnings: sentences that the reader must not miss.
        blocks: the blocks of results.json to list, by label.
        further: the blocks of the second table, by label, and sentences below it.
        zero_shot: (label, (top-1, top-5)) lines of the third one, in percent.
        names: the names of this run and of the other one.
        facts: the retrieved items.
        plots, training: the figures.
        images: the images that the facts refer to.
    """

    title: str
    subtitle: str
    about: Sequence[tuple[str, str]]
    warnings: Sequence[str]
    blocks: Mapping[str, dict[str, Any]]
    further: Mapping[str, dict[str, Any]]
    notes: Sequence[str]
    zero_shot: Sequence[tuple[str, tuple[float | None, ...]]]
    names: tuple[str, str]
    facts: Facts
    plots: Sequence[Plot]
    training: Sequence[Plot]
    images: Images


@dataclass(frozen=True)
class Cell:
    """A metric, and the bounds of its interval if there is one."""

    value: float | None
    interval: tuple[float, float] | None = None


def render(page: Page) -> str:
    """Render the page. Every text is escaped, and the page may load and run only what is in it."""
    return render_template(
        "report.html",
        "report.js",
        page=page,
        facts=page.facts,
        directions=DIRECTIONS,
        groups={name: label for name, label in GROUPS.items() if any(name in q.groups for q in page.facts.queries)},
        table=tabulate(page.blocks),
        further=tabulate(page.further),
        embed=Thumbnails(page.images).embed,
        format_rank=format_rank,
    )


@dataclass(frozen=True)
class Table:
    """A table of metrics: the columns, and (label, direction, cells) of each row."""

    columns: list[str]
    rows: list[tuple[str, str, list[Cell]]]

    @property
    def has_intervals(self) -> bool:
        return any(cell.interval for _, _, cells in self.rows for cell in cells)


def tabulate(blocks: Mapping[str, dict[str, Any]]) -> Table:
    """Make the table of blocks of results.json.

    Columns are the metrics that a block has, rows the directions that it has. rsum and mean recall, which belong to
    both directions, are on a block's first row.
    """
    directions = {label: {d: block.get(d) for d in DIRECTIONS} for label, block in blocks.items()}
    known = [each for found in directions.values() for each in found.values() if isinstance(each, dict)]
    columns = list(dict.fromkeys(name for each in known for name, value in each.items() if is_number(value)))
    rows: list[tuple[str, str, list[Cell]]] = []
    for label, block in blocks.items():
        intervals = block.get("intervals")
        for direction in [d for d in DIRECTIONS if isinstance(block.get(d), dict)]:
            metrics, bounds = directions[label][direction], _get(intervals, direction)
            cells = [_make_cell(_get(metrics, name), _get(bounds, name)) for name in columns]
            is_first = direction == "i2t"
            cells += [_make_cell(block.get(n) if is_first else None, _get(intervals, n)) for n in BOTH]
            rows.append((label, direction, cells))
    return Table([*columns, "mean recall", "rsum"], rows)


def _make_cell(value: Any, bounds: Any) -> Cell:
    """The cell of values from a results.json, which may hold anything."""
    if not is_number(value):
        return Cell(None)
    is_interval = isinstance(bounds, (list, tuple)) and len(bounds) == 2 and all(map(is_number, bounds))
    return Cell(value, (bounds[0], bounds[1]) if is_interval else None)


def is_number(value: Any) -> bool:
    """Whether a value of a results.json is a number that can be shown; a JSON integer may have any length."""
    return type(value) is float or (type(value) is int and abs(value) < 2**53)


def _get(mapping: Any, name: str) -> Any:
    return mapping.get(name) if isinstance(mapping, dict) else None


def format_rank(rank: float) -> str:
    """`1`, or `12.5` for the expectation over a random order of tied items."""
    return f"{rank:,.0f}" if rank == int(rank) else f"{rank:,.1f}"
