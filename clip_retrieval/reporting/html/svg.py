"""Figures as SVG that follows the page: text is text, and colours are variables of the style sheet."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (4.6, 2.9)  # inches of 72 SVG units
# Colours that stand for variables of report.css. plots.mplstyle uses the first two.
INK, GRID = "#010101", "#020202"
SERIES = ("#030303", "#040404", "#050505")
VARIABLES = {INK: "currentColor", GRID: "var(--grid)"} | {c: f"var(--series-{i})" for i, c in enumerate(SERIES, 1)}
STYLE = Path(__file__).with_name("templates") / "plots.mplstyle"


def draw_svg(draw: Callable[[Axes], None], label: str, size: tuple[float, float] = SIZE) -> Markup:
    """Draw into new axes, `size` inches of 72 SVG units, and return the SVG element with `label` for screen readers.

    Style attributes become presentation attributes, because the page's Content-Security-Policy forbids them.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    file = io.StringIO()
    with matplotlib.style.context([STYLE, {"svg.hashsalt": label}]):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    body = svg[svg.index("</defs>") + len("</defs>") : svg.rindex("</svg>")]  # without metadata and style sheet
    body = re.sub(r"<[a-z][^<>]*>", lambda match: _clean_tag(match[0]), body)  # not in texts, such as names of runs
    for color, variable in VARIABLES.items():
        body = body.replace(color, variable)
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    opening = f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(label)}"><title>{escape(label)}</title>'
    return Markup(f"{opening}{body}</svg>")


def _clean_tag(tag: str) -> str:
    """Write a tag without style attribute, and without an id that several figures would share."""
    tag = re.sub(r' style="([^"]*)"', lambda match: " " + _to_attributes(match[1]), tag)
    return re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick|legend)_\d+"', "", tag)


def _to_attributes(style: str) -> str:
    """`fill: none; stroke-width: 2` as attributes. Fonts are left to the style sheet, but for their size."""
    attributes = []
    for declaration in filter(None, (part.strip() for part in style.split(";"))):
        name, value = (part.strip() for part in declaration.split(":", 1))
        if name == "font":
            name, value = "font-size", re.search(r"[\d.]+px", value)[0]  # type: ignore[index]
        attributes.append(f'{name}="{value}"')
    return " ".join(attributes)
