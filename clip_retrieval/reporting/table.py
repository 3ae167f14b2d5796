"""Results as rounded tables; results.json keeps the unrounded numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clip_retrieval.errors import UserError, one_line

TABLE_WIDTH = 80  # characters of a line in the log

Row = dict[str, str | float | None]


def results_table(blocks: dict[str, dict[str, Any]]) -> str:
    """A table of the metrics common to all blocks (splits or stages of a run), in percent, for the log.

    Each block has a line for each direction, and one below it with half the width of the intervals if it has them.
    Columns beyond TABLE_WIDTH continue in a second table below.
    """
    # cells: mean and rsum belong to both directions, and are on the first line
    first = next(iter(blocks.values()))["i2t"]
    metrics = [name for name in first if all(name in block["i2t"] for block in blocks.values())]
    rows = [["", "", *metrics, "mean", "rsum"]]
    for name, block in blocks.items():
        for direction in ("i2t", "t2i"):
            cells = [f"{block[direction][metric]:.2f}" for metric in metrics]
            both = [f"{block[key]:.2f}" if direction == "i2t" else "" for key in ("mean_recall", "rsum")]
            rows.append([name if direction == "i2t" else "", direction, *cells, *both])
            if intervals := block.get("intervals"):
                spans = [intervals[direction].get(metric) for metric in metrics]
                spans += [intervals[key] if direction == "i2t" else None for key in ("mean_recall", "rsum")]
                rows.append(["", "±", *map(_half, spans)])

    # columns of each table
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    tables: list[list[int]] = [[0, 1]]
    for column in range(2, len(widths)):
        if len(tables[-1]) > 2 and sum(widths[i] + 2 for i in (*tables[-1], column)) - 2 > TABLE_WIDTH:
            tables.append([0, 1])
        tables[-1].append(column)

    # lines
    lines: list[str] = []
    for columns in tables:
        body = ["  ".join(row[i].rjust(widths[i]) for i in columns) for row in rows]
        lines += [body[0], "-" * len(body[0]), *body[1:]]
    if any("intervals" in block for block in blocks.values()):
        lines.append("±: half of the 95% interval (bootstrap over images)")
    return "\n".join(lines)


def _half(span: list[float] | None) -> str:
    """Half of the width of an interval; empty without one."""
    return f"{(span[1] - span[0]) / 2:.2f}" if span else ""


def protocols_table(protocols: dict[str, dict[str, Any]]) -> str:
    """A table of the protocols of a split, in percent, for the log: each direction, and below it half its intervals."""
    found = {name for block in protocols.values() for name in block["i2t"]}
    columns = [name for name in ("R@1", "R@5", "R@10", "R-P", "mAP@R") if name in found]
    rows = [["protocol", "", *columns]]
    for name, block in protocols.items():
        for direction in ("i2t", "t2i"):
            cells = [f"{block[direction][name]:.2f}" if name in block[direction] else "" for name in columns]
            rows.append([name if direction == "i2t" else "", direction, *cells])
            if spans := block.get("intervals", {}).get(direction):
                rows.append(["", "±", *(_half(spans.get(name)) for name in columns)])
    return align(rows)


RECALLS = ("R@1", "R@5", "R@10")


def align(rows: list[list[str]]) -> str:
    """A table for the log: a rule below the first row, the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def recall_cells(block: dict[str, Any]) -> list[str]:
    """The six recalls of a block, rounded; empty for a direction that it lacks."""
    return [f"{block[d][r]:.2f}" if d in block else "" for d in ("i2t", "t2i") for r in RECALLS]


RECALL_HEADS = ["i2t R@1", "R@5", "R@10", "t2i R@1", "R@5", "R@10"]


def rerank_table(blocks: dict[str, dict[str, Any]]) -> str:
    """A table of the recalls of re-ranked scores, in percent; below it the data and the parameter of each method."""
    rows, notes = [["re-ranked", *RECALL_HEADS, "rsum"]], []
    for name, block in blocks.items():
        rows.append([name, *recall_cells(block), f"{block['rsum']:.2f}" if "rsum" in block else ""])
        if spans := block.get("intervals"):
            halves = [_half(spans[d][r]) if d in spans else "" for d in ("i2t", "t2i") for r in RECALLS]
            rows.append(["±", *halves, _half(spans.get("rsum"))])
        parameter = next(key for key in ("temperature", "k", "share") if key in block)
        notes.append(f"{name} uses {block['uses']}; {parameter} {block[parameter]:.3g} ({block['chosen_on']})")
    return "\n".join([align(rows), *notes])


COLUMNS = (
    "model",
    "data",
    *(f"{direction} {recall}" for direction in ("i2t", "t2i") for recall in RECALLS),
    "mean recall",
    "rsum",
    "rsum before",
    "run",
    "loss",
    "lr",
    "path",
)
"""Columns of the Markdown table."""


def results_row(results: dict[str, Any], options: dict[str, Any], *, run: str, path: str) -> Row:
    """Make a row of the Markdown table, with a value or None for each of COLUMNS.

    Args:
        results: the content of results.json. Without recalls (a run without val and test split), these are None.
        options: the content of options.json, or an empty dict.
        run: the name of the run.
        path: the results file or the folder of the run.
    """
    before = results.get("before")
    data = " ".join(one_line(results.get(name, "")) for name in ("dataset", "split")).strip()
    row: Row = {
        "model": one_line(results.get("model", "")),
        "data": data or options.get("dataset"),
        "rsum before": recall_sum(before) if isinstance(before, dict) else None,
        "run": run,
        "loss": options.get("loss"),
        "lr": options.get("lr"),
        "path": path,
    }
    if "i2t" in results:
        row |= {f"{d} {r}": results[d][r] for d in ("i2t", "t2i") for r in RECALLS}
        row |= {"mean recall": results["mean_recall"], "rsum": recall_sum(results)}
    return {column: row.get(column) for column in COLUMNS}


def recall_sum(block: dict[str, Any]) -> float:
    """Sum the six recalls of a block, in percent."""
    return sum(block[direction][recall] for direction in ("i2t", "t2i") for recall in RECALLS)


def sort_rows(rows: list[Row], column: str, columns: Sequence[str] = COLUMNS) -> list[Row]:
    """Sort rows by a column: numbers from the highest, texts by alphabet, missing values last.

    Raises UserError if the table has no such column.
    """
    if column not in columns:
        raise UserError(f"--sort {column}: no such column; choose from {', '.join(columns)}")
    numbers = [row for row in rows if isinstance(row[column], (int, float))]
    texts = [row for row in rows if isinstance(row[column], str) and row[column]]
    missing = [row for row in rows if row[column] in (None, "")]
    return [
        *sorted(numbers, key=lambda row: row[column], reverse=True),  # type: ignore[arg-type,return-value]
        *sorted(texts, key=lambda row: str(row[column])),
        *missing,
    ]


def markdown_table(rows: list[Row], columns: Sequence[str] = COLUMNS) -> str:
    """A Markdown table with a line for each row, such as those of `results_row`; recalls in percent."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(format_cell(name, row[name]) for name in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def format_cell(column: str, value: Any) -> str:
    if column == "lr" and isinstance(value, (int, float)):
        return f"{value:g}"
    if isinstance(value, (int, float)):
        return f"{value:.2f}"
    return "" if value is None else one_line(value).replace("|", "\\|")
