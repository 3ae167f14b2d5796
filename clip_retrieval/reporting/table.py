"""Results as rounded tables; results.json keeps the unrounded numbers."""

from __future__ import annotations

from typing import Any

from clip_retrieval.errors import one_line


def results_table(blocks: dict[str, dict[str, Any]]) -> str:
    """A table with one line per block (split or stage of a run), and the metrics common to all, in percent."""
    first = next(iter(blocks.values()))["i2t"]
    columns = [name for name in first if all(name in block["i2t"] for block in blocks.values())]
    header = ["", *(f"i2t {c}" for c in columns), *(f"t2i {c}" for c in columns), "mean", "rsum"]
    rows = [header]
    for name, block in blocks.items():
        values = [block[direction][c] for direction in ("i2t", "t2i") for c in columns]
        rows.append([name, *(f"{v:.2f}" for v in [*values, block["mean_recall"], block["rsum"]])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(results: list[dict[str, Any]]) -> str:
    """A Markdown table with one line per results.json: model, data, recalls of both directions in percent."""
    recalls = ("R@1", "R@5", "R@10")
    header = ["model", "data", *(f"{d} {r}" for d in ("i2t", "t2i") for r in recalls), "mean recall"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for block in results:
        values = [block[d][r] for d in ("i2t", "t2i") for r in recalls] + [block["mean_recall"]]
        model, *data = (one_line(block.get(name, "")) for name in ("model", "dataset", "split"))
        cells = [model, " ".join(data).strip(), *(f"{value:.2f}" for value in values)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
