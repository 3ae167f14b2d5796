import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image

from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.reporting import figures
from clip_retrieval.reporting.figures import Panel, draw_predictions, fonts_for

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
def test_a_grid_of_one_size_for_each_image(tmp_path, number, columns, rows):
    (path,) = draw_predictions(panels(number), tmp_path / "figure.png", "a model")
    assert path == tmp_path / "figure.png"
    pixels = drawn(path)
    cell_width, cell_height = 330 + 495, 330  # a photo of 2.2 inches and a chart of 3.3, at 150 dots each
    assert abs(pixels.shape[1] - columns * cell_width) < columns * 200
    assert abs(pixels.shape[0] - rows * cell_height) < 130 + rows * 50
    red = (np.abs(pixels - (200, 30, 30)) < 4).all(axis=-1)
    assert red.sum() == pytest.approx(number * 330 * 220, rel=0.02)  # 60 x 40, as wide as the photo's place


def test_bars_are_as_long_as_the_probabilities(tmp_path):
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
def test_long_names_are_cut_and_none_is_read_as_a_formula(tmp_path, text):
    (short,) = draw_predictions(panels(2, [("a", 80.0), ("b", 20.0)]), tmp_path / "short.png", "a")
    long_panels = [Panel(text, panel.image, [(text, 80.0), ("b", 20.0)]) for panel in panels(2)]
    (long,) = draw_predictions(long_panels, tmp_path / "long.png", text * 5)
    before, after = drawn(short), drawn(long)
    assert before.shape == after.shape
    margin = figures.MARGIN * figures.DPI
    dark = (after.min(axis=2) < 120) & (after.max(axis=2) < 140)  # text only: the bars are blue, the photo is red
    assert not dark[:, -int(margin) :].any() and not dark[:, : int(margin) - 2].any()


def test_wide_and_tall_images_keep_their_shape(tmp_path):
    for size in ((600, 60), (60, 600), (3000, 2)):
        (path,) = draw_predictions(panels(1, size=size), tmp_path / "figure.png", "a")
        rows, columns = np.nonzero((np.abs(drawn(path) - (200, 30, 30)) < 4).all(axis=-1))
        width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
        assert max(width, height) == pytest.approx(330, abs=2)
        assert min(width, height) == pytest.approx(330 * min(size) / max(size), abs=2)


@pytest.fixture
def said(monkeypatch):
    warnings = []
    monkeypatch.setattr(log, "warning", warnings.append)
    return warnings


@pytest.fixture(autouse=True)
def no_new_fonts(monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", list)


def test_a_font_that_was_installed_after_matplotlib_listed_them_is_found(monkeypatch, said):
    class Font:
        style, weight, name, fname = "normal", 400, "Chinese", "chinese.ttf"

    real, fonts = figures._characters, []
    monkeypatch.setattr(figures, "_characters", lambda path: {ord("苹")} if path == "chinese.ttf" else real(path))
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: ["chinese.ttf"])
    monkeypatch.setattr(font_manager.fontManager, "addfont", lambda path: fonts.append(Font))
    assert fonts_for(["苹"]) == [figures.FONT, "Chinese"] and not said


def test_a_font_that_has_the_characters_is_found(monkeypatch, said):
    class Font:
        style, weight, name, fname = "normal", 400, "Chinese", "chinese.ttf"

    class Other(Font):
        name, fname = "A font with less", "less.ttf"

    real = figures._characters
    has = {"chinese.ttf": set(map(ord, "苹果狗")), "less.ttf": set(map(ord, "苹果"))}
    monkeypatch.setattr(figures, "_characters", lambda path: has.get(path) or real(path))
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [Other, Font])
    assert fonts_for(["an apple", "苹果"]) == [figures.FONT, "A font with less"]
    assert fonts_for(["苹果", "狗"]) == [figures.FONT, "Chinese"]
    assert fonts_for(["plain", "Äpfel"]) == [figures.FONT]
    assert not said


def test_several_fonts_help_each_other_out(monkeypatch, said):
    class Font:
        style, weight, name, fname = "normal", 400, "Chinese", "chinese.ttf"

    class Other(Font):
        name, fname = "Emoji", "emoji.ttf"

    real = figures._characters
    has = {"chinese.ttf": set(map(ord, "苹果狗")), "emoji.ttf": {0x1F34E}}
    monkeypatch.setattr(figures, "_characters", lambda path: has.get(path) or real(path))
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [Other, Font])
    assert fonts_for(["苹果 \U0001f34e"]) == [figures.FONT, "Chinese", "Emoji"]
    assert not said
    assert fonts_for(["苹果 猫"]) == [figures.FONT, "Chinese"]
    assert len(said) == 1 and "猫" in said[0] and "苹" not in said[0]


def test_no_font_is_said_once(tmp_path, monkeypatch, said):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    panel = Panel("苹果.jpg", lambda: Image.new("RGB", (4, 4)), [("苹果", 80.0), ("狗", 20.0)])
    draw_predictions([panel] * 13, tmp_path / "figure.png", "苹果")
    (warning,) = said
    assert "苹" in warning and "Noto Sans CJK" in warning


def test_matplotlibs_own_placeholders_are_no_font(said):
    """A private-use character, which only the font of boxes for all characters has."""
    assert fonts_for(["\U000f1234"]) == [figures.FONT]
    assert len(said) == 1


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none/figure\.png cannot be written .*--output"):
        draw_predictions(panels(1), tmp_path / "none" / "figure.png", "a")
