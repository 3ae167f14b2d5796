import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image

from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.reporting import figures
from clip_retrieval.reporting.figures import Panel, draw_predictions, find_fonts

BARS = [("lawn mower", 61.0), ("sea", 20.0), ("mushroom", 9.5), ("worm", 0.5), ("cloud", 0.0)]


def panels(number, bars=BARS, size=(60, 40)):
    colour = (200, 30, 30)
    return [Panel(f"{i}.jpg", lambda: Image.new("RGB", size, colour), bars) for i in range(number)]


def drawn(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def is_colour(pixels, hexadecimal):
    colour = np.array([int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5)])
    return (np.abs(pixels - colour) < 4).all(axis=-1)


@pytest.mark.parametrize("number, columns, rows", [(1, 1, 1), (2, 2, 1), (3, 2, 2), (7, 2, 4), (12, 2, 6)])
def test_panels_form_a_grid_of_equal_cells(tmp_path, number, columns, rows):
    (path,) = draw_predictions(panels(number), tmp_path / "figure.png", "a model")
    assert path == tmp_path / "figure.png"
    pixels = drawn(path)
    cell_width, cell_height = 330 + 495, 330  # a photo of 2.2 inches and a chart of 3.3, at 150 dpi
    assert abs(pixels.shape[1] - columns * cell_width) < columns * 200
    assert abs(pixels.shape[0] - rows * cell_height) < 130 + rows * 50
    red = (np.abs(pixels - (200, 30, 30)) < 4).all(axis=-1)
    assert red.sum() == pytest.approx(number * 330 * 220, rel=0.02)  # 60 x 40 scaled to the width of a photo


def test_bar_lengths_equal_the_probabilities(tmp_path):
    (path,) = draw_predictions(panels(1), tmp_path / "figure.png", "a model")
    pixels = drawn(path)
    first = is_colour(pixels, figures.FIRST).sum(axis=1).max()
    others = is_colour(pixels, figures.OTHER).sum(axis=1)
    assert first == pytest.approx(0.61 * 495, abs=3)
    assert others.max() == pytest.approx(0.20 * 495, abs=3)


def test_many_images_take_several_pages(tmp_path):
    paths = draw_predictions(panels(27), tmp_path / "figure.png", "a model")
    assert [path.name for path in paths] == [f"figure_{page}_of_3.png" for page in (1, 2, 3)]
    heights = [drawn(path).shape[0] for path in paths]
    draw_predictions(panels(13), tmp_path / "figure.png", "a model")
    (tmp_path / "figure_of_mine.png").touch()
    draw_predictions(panels(13), tmp_path / "figure.png", "a model")
    names = [f"figure_{page}_of_2.png" for page in (1, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "figure_of_mine.png"]
    draw_predictions(panels(1), tmp_path / "figure.png", "a model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.png", "figure_of_mine.png"]
    draw_predictions(panels(13), tmp_path / "figure.png", "a model")
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "figure_of_mine.png"]
    assert heights[0] == heights[1] > heights[2]


@pytest.mark.parametrize(
    "text", ["a name that is far too long for the place that it has in the figure " * 3, r"$\frac{1$"]
)
def test_long_names_are_cut_and_math_is_not_parsed(tmp_path, text):
    (short,) = draw_predictions(panels(2, [("a", 80.0), ("b", 20.0)]), tmp_path / "short.png", "a")
    long_panels = [Panel(text, panel.image, [(text, 80.0), ("b", 20.0)]) for panel in panels(2)]
    (long,) = draw_predictions(long_panels, tmp_path / "long.png", text * 5)
    before, after = drawn(short), drawn(long)
    assert before.shape == after.shape
    margin = figures.MARGIN * figures.DPI
    dark = (after.min(axis=2) < 120) & (after.max(axis=2) < 140)  # only the text: bars are blue, the photo is red
    assert not dark[:, -int(margin) :].any() and not dark[:, : int(margin) - 2].any()


def test_images_keep_their_aspect_ratio(tmp_path):
    for size in ((600, 60), (60, 600), (3000, 2)):
        (path,) = draw_predictions(panels(1, size=size), tmp_path / "figure.png", "a")
        rows, columns = np.nonzero((np.abs(drawn(path) - (200, 30, 30)) < 4).all(axis=-1))
        width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
        assert max(width, height) == pytest.approx(330, abs=2)
        assert min(width, height) == pytest.approx(330 * min(size) / max(size), abs=2)


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(log, "warning", messages.append)
    return messages


@pytest.fixture(autouse=True)
def no_new_fonts(monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", list)


def test_font_missing_in_matplotlibs_cache_is_found(monkeypatch, warnings):
    class Font:
        style, weight, name, fname = "normal", 400, "Chinese", "chinese.ttf"

    real, fonts = figures._characters, []
    monkeypatch.setattr(figures, "_characters", lambda path: {ord("苹")} if path == "chinese.ttf" else real(path))
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: ["chinese.ttf"])
    monkeypatch.setattr(font_manager.fontManager, "addfont", lambda path: fonts.append(Font))
    assert find_fonts(["苹"]) == [figures.FONT, "Chinese"] and not warnings


def test_font_with_the_most_characters_is_chosen(monkeypatch, warnings):
    class Font:
        style, weight, name, fname = "normal", 400, "Chinese", "chinese.ttf"

    class Other(Font):
        name, fname = "A font with less", "less.ttf"

    real = figures._characters
    has = {"chinese.ttf": set(map(ord, "苹果狗")), "less.ttf": set(map(ord, "苹果"))}
    monkeypatch.setattr(figures, "_characters", lambda path: has.get(path) or real(path))
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [Other, Font])
    assert find_fonts(["an apple", "苹果"]) == [figures.FONT, "A font with less"]
    assert find_fonts(["苹果", "狗"]) == [figures.FONT, "Chinese"]
    assert find_fonts(["plain", "Äpfel"]) == [figures.FONT]
    assert not warnings


def test_several_fonts_are_combined(monkeypatch, warnings):
    class Font:
        style, weight, name, fname = "normal", 400, "Chinese", "chinese.ttf"

    class Other(Font):
        name, fname = "Emoji", "emoji.ttf"

    real = figures._characters
    has = {"chinese.ttf": set(map(ord, "苹果狗")), "emoji.ttf": {0x1F34E}}
    monkeypatch.setattr(figures, "_characters", lambda path: has.get(path) or real(path))
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [Other, Font])
    assert find_fonts(["苹果 \U0001f34e"]) == [figures.FONT, "Chinese", "Emoji"]
    assert not warnings
    assert find_fonts(["苹果 猫"]) == [figures.FONT, "Chinese"]
    assert len(warnings) == 1 and "猫" in warnings[0] and "苹" not in warnings[0]


def test_missing_font_is_logged_once(tmp_path, monkeypatch, warnings):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    panel = Panel("苹果.jpg", lambda: Image.new("RGB", (4, 4)), [("苹果", 80.0), ("狗", 20.0)])
    draw_predictions([panel] * 13, tmp_path / "figure.png", "苹果")
    (warning,) = warnings
    assert "苹" in warning and "Noto Sans CJK" in warning


def test_placeholder_font_is_not_chosen(warnings):
    """Only the placeholder font has this private-use character."""
    assert find_fonts(["\U000f1234"]) == [figures.FONT]
    assert len(warnings) == 1


def test_unwritable_figure_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"none/figure\.png: cannot be written .*--output"):
        draw_predictions(panels(1), tmp_path / "none" / "figure.png", "a")
