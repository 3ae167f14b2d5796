"""Figures, drawn with Agg into PNG files: images beside their top classes, and the curve of an interpolation."""

from __future__ import annotations

import re
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
    from matplotlib.figure import Figure, SubFigure

PER_PAGE = 12
COLUMNS = 2
# Inches.
PHOTO, CHART, TITLE, GAP, MARGIN, HEADING = 2.2, 3.3, 0.25, 0.25, 0.3, 0.55
DPI = 150
FONT = "DejaVu Sans"  # comes with matplotlib
PLACEHOLDERS = "Last Resort High-Efficiency"  # comes with matplotlib: a box for any character
DARK, GREY, PALE, FIRST, OTHER = "#222222", "#777777", "#ececec", "#2f6db5", "#9dbde0"
SECOND = "#c2571a"  # of a second axis


@dataclass(frozen=True)
class Panel:
    """An image and its predicted classes.

    Attributes:
        title: text above the chart.
        image: function that opens the image.
        bars: (class name, probability in percent), best first.
    """

    title: str
    image: Callable[[], Image.Image]
    bars: Sequence[tuple[str, float]]


def draw_predictions(panels: Sequence[Panel], path: Path, heading: str) -> list[Path]:
    """Draw panels into `path`, a .png, or several pages `{name}_1_of_4.png`, ... if they do not fit one page.

    Earlier pages of the same name are deleted. Returns the new files. Raises UserError if one cannot be written.
    """
    heading, panels = printable(heading), [_make_printable(panel) for panel in panels]
    pages = [panels[start : start + PER_PAGE] for start in range(0, len(panels), PER_PAGE)]
    texts = [heading, *(text for panel in panels for text in (panel.title, *(name for name, _ in panel.bars)))]
    fonts = find_fonts(texts)
    # draw the pages
    paths = []
    for number, page in enumerate(pages, 1):
        name = path if len(pages) == 1 else path.with_name(f"{path.stem}_{number}_of_{len(pages)}{path.suffix}")
        _save(_draw_page(page, heading, fonts), name)
        paths.append(name)
    # delete the pages of an earlier call
    for earlier in find_drawn_pages(path):
        if earlier not in paths:
            earlier.unlink(missing_ok=True)
    return paths


def _save(figure: Figure, path: Path) -> None:
    try:
        with _ignore_missing_glyphs(), write_atomic(path) as file:
            figure.savefig(file, format="png")
    except (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --output") from None


def draw_interpolation(
    path: Path, alphas: Sequence[float], rsums: dict[str, list[float]], accuracy: list[float] | None, best: float
) -> None:
    """Draw rsum by split, and zero-shot accuracy on a second axis, over alpha; a line marks the best alpha.

    Raises UserError if `path`, a .png, cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("alpha (0: start, 1: finetuned)", family=FONT)
    axes.set_ylabel("rsum", family=FONT)
    axes.axvline(best, color=PALE, linewidth=4, zorder=0)
    lines = []
    for name, rsum in rsums.items():
        line = {"test": "-", "val": "--"}.get(name, ":")
        style: dict[str, Any] = {"color": FIRST if line != ":" else SECOND, "linestyle": line, "marker": "."}
        lines += axes.plot(alphas, rsum, label=name, **style)
    if accuracy is not None:
        right = axes.twinx()
        right.set_ylabel("zero-shot top-1, %", family=FONT)
        lines += right.plot(alphas, accuracy, color=SECOND, marker=".", label="zero-shot")
    axes.legend(handles=lines, frameon=False)
    _save(figure, path)


@contextmanager
def _ignore_missing_glyphs() -> Iterator[None]:
    """Silence matplotlib's warning for each missing character; `find_fonts` logs them once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def _make_printable(panel: Panel) -> Panel:
    """Replace half surrogate pairs, which fonts cannot draw."""
    return Panel(printable(panel.title), panel.image, [(printable(name), percent) for name, percent in panel.bars])


def find_drawn_pages(path: Path) -> list[Path]:
    """The existing files that `draw_predictions` wrote for `path`, including pages."""
    pages = path.parent.glob(f"{escape(path.stem)}_*_of_*{path.suffix}")
    is_page = re.compile(rf"{re.escape(path.stem)}_\d+_of_\d+")
    return [each for each in (path, *pages) if each.exists() and (each == path or is_page.fullmatch(each.stem))]


def find_fonts(texts: Iterable[str]) -> list[str]:
    """Font families for matplotlib's fallback that together have all characters; logs the characters that none has."""
    from matplotlib import font_manager

    families, manager = [FONT], font_manager.fontManager
    missing = {ord(character) for text in texts for character in text if not character.isspace()}
    missing -= _characters(font_manager.findfont(FONT))
    if not missing:
        return families
    # matplotlib caches its list of fonts: add those that were installed later
    for path in sorted(set(font_manager.findSystemFonts()) - {font.fname for font in manager.ttflist}):
        with suppress(OSError, RuntimeError):
            manager.addfont(path)
    coverage: dict[str, set[int]] = {}
    for font in sorted(manager.ttflist, key=lambda font: (font.weight != 400, font.name)):
        if font.style == "normal" and font.name not in {PLACEHOLDERS, *coverage}:
            coverage[font.name] = missing & _characters(font.fname)
    for name in sorted(coverage, key=lambda name: -len(coverage[name])):
        if missing & coverage[name]:
            families.append(name)
            missing -= coverage[name]
    if missing:
        shown = "".join(map(chr, sorted(missing)[:5]))
        log.warning(f"no font here has the characters {shown}; to see them, install one, such as Noto Sans CJK")
    return families


def _characters(path: str) -> set[int]:
    """Code points of a font file; none if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return set(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return set()


def _draw_page(panels: Sequence[Panel], heading: str, fonts: list[str]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    cell = PHOTO + GAP + CHART
    width = 2 * MARGIN + columns * cell + (columns - 1) * 2 * GAP
    height = HEADING + rows * (PHOTO + GAP) - GAP + MARGIN
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    style: dict[str, Any] = {"family": fonts, "parse_math": False}
    title = _shorten(figure, heading, width - 2 * MARGIN, {"size": 9, **style})
    figure.text(MARGIN / width, 1 - 0.6 * HEADING / height, title, size=9, color=GREY, **style)
    # draw a photo and a chart per panel, in a grid
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
    """Draw the title, and for each class its name and percent above a bar from 0 to 100 %."""
    axes.axis("off")
    axes.set_xlim(0, 1)
    axes.set_ylim(PHOTO, 0)  # inches from the top
    title = _shorten(axes.figure, panel.title, CHART, {"size": 9, **style})
    axes.text(0, TITLE / 2, title, size=9, color=GREY, **style)
    step = (PHOTO - TITLE) / max(5, len(panel.bars))
    for number, (name, percent) in enumerate(panel.bars):
        line, bar = TITLE + number * step + 0.2, TITLE + number * step + 0.3
        color = OTHER if number else FIRST
        weight = "normal" if number or len(style["family"]) > 1 else "bold"  # other fonts may have no bold face
        label = _shorten(axes.figure, name, CHART - 0.7, {"size": 10, "weight": weight, **style})
        axes.text(0, line, label, size=10, color=DARK, weight=weight, **style)
        axes.text(1, line, f"{percent:.1f} %", size=9, color=DARK, weight=weight, ha="right", **style)
        axes.barh(bar, 1, height=0.09, color=PALE)
        axes.barh(bar, percent / 100, height=0.09, color=color)


def _shorten(figure: Figure | SubFigure, text: str, inches: float, style: dict[str, Any]) -> str:
    """The text on one line; if it is wider than `inches`, cut with an ellipsis."""
    text = " ".join(text.split())
    probe = figure.text(0, 0, "", **style)

    def is_too_wide(shown: str) -> bool:
        probe.set_text(shown)
        return probe.get_window_extent().width > inches * figure.dpi

    def cut(length: int) -> str:
        return text[:length].rstrip() + "…"

    with _ignore_missing_glyphs():
        if is_too_wide(text):
            text = cut(bisect_left(range(1, len(text)), True, key=lambda length: is_too_wide(cut(length))))
    probe.remove()
    return text


def draw_loss_curve(
    path: Path, rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], marks: dict[str, float]
) -> None:
    """Draw losses over learning rates into `path`, .svg or .png. marks: rates to mark with a line, by label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.plot(rates, losses, color=OTHER, linewidth=1, label="loss")
    axes.plot(rates, smoothed, color=FIRST, linewidth=2, label="smoothed")
    for label, rate in marks.items():
        axes.axvline(rate, color=GREY, linestyle="--", label=label)
    axes.set_xscale("log")
    axes.set(xlabel="learning rate", ylabel="loss of a batch")
    axes.legend()
    with write_atomic(path) as file:
        figure.savefig(file, format=path.suffix[1:])
