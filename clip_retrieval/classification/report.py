"""Zero-shot accuracy as text; results.json keeps the unrounded numbers."""

from __future__ import annotations

import unicodedata
from typing import Any

from clip_retrieval.errors import format_counts


def summary(block: dict[str, Any]) -> str:
    """One line: data set, sizes and accuracy in percent."""
    tops = "  ".join(f"{name} {block[name]:.2f}" for name in block if name.startswith("top"))
    return (
        f"{block['dataset']}: {format_counts(image=block['images'], **{'class': block['classes']})}  {tops}  "
        f"mean per class {block['mean_per_class']:.2f}"
    )


def per_class_table(block: dict[str, Any]) -> str:
    """A table with one line per class: name, images, top-1 in percent, most frequent wrong prediction."""
    rows = [("class", "images", "top1", "most confused with")]
    for each in block["per_class"]:
        confused = f"{each['confused_with']} ({each['confused']:.1f})" if each["confused_with"] else ""
        rows.append((each["class"], f"{each['images']:,}", f"{each['top1']:.2f}", confused))
    widths = [max(_width(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"{name}{' ' * (widths[0] - _width(name))}  {images:>{widths[1]}}  {top:>{widths[2]}}  {confused}".rstrip()
        for name, images, top, confused in rows
    ]
    return "\n".join([lines[0], "-" * max(map(_width, lines)), *lines[1:]])


def _width(text: str) -> int:
    """Width in terminal columns: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
