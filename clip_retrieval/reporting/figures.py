"""Figures of what a classifier says: each image beside a bar chart of its best classes, in PNG files drawn with Agg."""

from __future__ import annotations

import re
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from clip_retrieval.errors import UserError, printable
from clip_retrieval.files import write_atomic
from clip_retrieval.log import log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PER_PAGE = 12
COLUMNS = 2
# Inches.
PHOTO, CHART, TITLE, GAP, MARGIN, HEADING = 2.2, 3.3, 0.25, 0.25, 0.3, 0.55
DPI = 150
FONT = "DejaVu Sans"  # comes with matplotlib
PLACEHOLDERS = "Last Resort High-Efficiency"  # so does this one: a box for any character
MISSING = "Glyph .* missing"  # a warning for each character; `fonts_for` says it once
DARK, GREY, PALE, FIRST, OTHER = "#222222", "#777777", "#ececec", "#2f6db5", "#9dbde0"


@dataclass(frozen=True)
class Panel:
    """An image and what it is taken for.

    Attributes:
        title: what stands above the chart.
        image: opens the image, when it is drawn.
        bars: (class name, probability in percent), best first.
    """

    title: str
    image: Callable[[], Image.Image]
    bars: Sequence[tuple[str, float]]


def draw_predictions(panels: Sequence[Panel], path: Path, heading: str) -> list[Path]:
    """Draw panels into `path`, a .png, or where they are many onto several pages, `{name}_1_of_4.png`, ...

    Pages that were drawn there before are replaced. Returns the files that were written. Raises UserError where one
    cannot be.
    """
    heading, panels = printable(heading), [_printable(panel) for panel in panels]
    pages = [panels[start : start + PER_PAGE] for start in range(0, len(panels), PER_PAGE)]
    texts = [heading, *(text for panel in panels for text in (panel.title, *(name for name, _ in panel.bars)))]
    fonts = fonts_for(texts)
    paths = []
    for number, page in enumerate(pages, 1):
        name = path if len(pages) == 1 else path.with_name(f"{path.stem}_{number}_of_{len(pages)}{path.suffix}")
        figure = _page(page, heading, fonts)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", MISSING)
                with write_atomic(name) as file:
                    figure.savefig(file, format="png")
        except (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise UserError(f"{name} cannot be written ({error.strerror}); choose another --output") from None
        paths.append(name)
    for before in find_drawn_pages(path):
        if before not in paths:
            before.unlink(missing_ok=True)
    return paths


def _printable(panel: Panel) -> Panel:
    """The panel in characters that can be drawn: fonts take no half surrogate pairs."""
    return Panel(printable(panel.title), panel.image, [(printable(name), percent) for name, percent in panel.bars])


def find_drawn_pages(path: Path) -> list[Path]:
    """The files that `draw_predictions` has written for `path`, its pages included."""
    pages = path.parent.glob(f"{escape(path.stem)}_*_of_*{path.suffix}")
    is_page = re.compile(rf"{re.escape(path.stem)}_\d+_of_\d+")
    return [each for each in (path, *pages) if each.exists() and (each == path or is_page.fullmatch(each.stem))]


def fonts_for(texts: Iterable[str]) -> list[str]:
    """Font families that together have the characters of the texts; says so where some are in none."""
    from matplotlib import font_manager

    families = [FONT]
    needed = {ord(character) for text in texts for character in text if not character.isspace()}
    needed -= _characters(font_manager.findfont(FONT))
    if not needed:
        return families
    has = _fonts_with(needed)
    if needed - set().union(*has.values()):
        # matplotlib lists the fonts once, and keeps the list: those that were installed later are not in it.
        listed = {font.fname for font in font_manager.fontManager.ttflist}
        for new in sorted(set(font_manager.findSystemFonts()) - listed):
            with suppress(OSError, RuntimeError):
                font_manager.fontManager.addfont(new)
        has = _fonts_with(needed)
    while needed:
        best = max(has, key=lambda name: len(has[name] & needed), default=None)
        if best is None or not has[best] & needed:
            shown = "".join(map(chr, sorted(needed)[:5]))
            log.warning(f"no font here has the characters {shown}; install one, such as Noto Sans CJK, to read them")
            break
        families.append(best)
        needed -= has[best]
    return families


def _fonts_with(needed: set[int]) -> dict[str, set[int]]:
    """Of each font family, regular ones first, those of the code points that it has."""
    from matplotlib import font_manager

    has: dict[str, set[int]] = {}
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: (font.weight != 400, font.name)):
        if font.style == "normal" and font.name != PLACEHOLDERS and font.name not in has:
            has[font.name] = needed & _characters(font.fname)
    return has


def _characters(path: str) -> set[int]:
    """Code points that a font file has; none where it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return set(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return set()


def _page(panels: Sequence[Panel], heading: str, fonts: list[str]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    cell = PHOTO + GAP + CHART
    width = 2 * MARGIN + columns * cell + (columns - 1) * 2 * GAP
    height = HEADING + rows * (PHOTO + GAP) - GAP + MARGIN
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    style = {"family": fonts, "parse_math": False}
    title = _fitting(figure, heading, width - 2 * MARGIN, {"size": 9, **style})
    figure.text(MARGIN / width, 1 - 0.6 * HEADING / height, title, size=9, color=GREY, **style)
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        left = MARGIN + column * (cell + 2 * GAP)
        bottom = height - HEADING - row * (PHOTO + GAP) - PHOTO
        photo = figure.add_axes((left / width, bottom / height, PHOTO / width, PHOTO / height))
        _draw_photo(photo, panel.image())
        chart = figure.add_axes(((left + PHOTO + GAP) / width, bottom / height, CHART / width, PHOTO / height))
        _draw_chart(chart, panel, style)
    return figure


def _draw_photo(axes: Axes, image: Image.Image) -> None:
    scale = round(PHOTO * DPI) / max(image.size)
    size = [max(1, round(length * scale)) for length in image.size]
    axes.imshow(image.resize(size, Image.Resampling.LANCZOS), interpolation="none")
    axes.set_anchor("NW")
    axes.axis("off")


def _draw_chart(axes: Axes, panel: Panel, style: dict[str, Any]) -> None:
    """The title, and below it for each class a line with its name and percent, and the bar under that, 0 to 100 %."""
    axes.axis("off")
    axes.set_xlim(0, 1)
    axes.set_ylim(PHOTO, 0)  # inches from the top
    title = _fitting(axes.figure, panel.title, CHART, {"size": 9, **style})
    axes.text(0, TITLE / 2, title, size=9, color=GREY, **style)
    step = (PHOTO - TITLE) / max(5, len(panel.bars))
    for number, (name, percent) in enumerate(panel.bars):
        line, bar = TITLE + number * step + 0.2, TITLE + number * step + 0.3
        color = OTHER if number else FIRST
        weight = "normal" if number or len(style["family"]) > 1 else "bold"  # of other fonts there may be no bold one
        label = _fitting(axes.figure, name, CHART - 0.7, {"size": 10, "weight": weight, **style})
        axes.text(0, line, label, size=10, color=DARK, weight=weight, **style)
        axes.text(1, line, f"{percent:.1f} %", size=9, color=DARK, weight=weight, ha="right", **style)
        axes.barh(bar, 1, height=0.09, color=PALE)
        axes.barh(bar, percent / 100, height=0.09, color=color)


def _fitting(figure: Figure, text: str, inches: float, style: dict[str, Any]) -> str:
    """The text on one line, cut to this width with an ellipsis where it is wider."""
    text = " ".join(text.split())
    drawn = figure.text(0, 0, "", **style)

    def too_wide(shown: str) -> bool:
        drawn.set_text(shown)
        return drawn.get_window_extent().width > inches * figure.dpi

    def cut(length: int) -> str:
        return text[:length].rstrip() + "…"

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", MISSING)
        if too_wide(text):
            text = cut(bisect_left(range(1, len(text)), True, key=lambda length: too_wide(cut(length))))
    drawn.remove()
    return text
