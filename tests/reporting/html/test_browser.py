"""The report in headless Chromium: no errors, no requests, search, filters, keys, themes and narrow screens work."""

import shutil

import pytest

from clip_retrieval.reporting.html.write import write_report
from tests.reporting.html.conftest import HOSTILE, make_run


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with playwright.sync_playwright() as tools:
        try:
            browser = tools.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, make_run(photos, 0.8), make_run(photos, 0.3, name="other"))
    return path


@pytest.fixture
def page(browser, report):
    """The open page. Messages of the console, errors and requests fail the test."""
    page, faults = browser.new_page(viewport={"width": 1280, "height": 900}), []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("data:", "file://")) or faults.append(request.url))
    page.goto(report.as_uri())
    yield page
    page.close()
    assert faults == []


def shown(page):
    return page.locator("#cards article:visible")


def test_hostile_caption_is_shown_as_text(page):
    assert page.title() == "run and other"
    assert page.get_by_text(HOSTILE, exact=True).count() > 0


def test_all_pictures_are_loaded(page):
    broken = page.evaluate(
        """async () => {
            const images = [...document.images];
            images.forEach((image) => { image.loading = "eager"; });
            await Promise.all(images.map((image) => image.decode().catch(() => {})));
            return [images.length, images.filter((image) => !image.naturalWidth || !image.alt).length];
        }"""
    )
    assert broken[0] > 50 and broken[1] == 0


def test_search_finds_words_of_queries_and_items(page):
    total = shown(page).count()
    page.fill("#search", "NUMBER 7, take")
    found = shown(page)
    assert 0 < found.count() < total
    assert page.locator("#count").inner_text() == f"{found.count()} of {total} queries"
    page.fill("#search", "no such words")
    assert shown(page).count() == 0
    page.press("#search", "Escape")
    assert shown(page).count() == total


def test_filters_combine(page):
    page.select_option("#direction", "t2i")
    page.select_option("#outcome", "wrong")
    cards = shown(page)
    assert cards.count() > 0
    for card in cards.all():
        assert card.get_attribute("data-direction") == "t2i" and card.locator(".badge").first.inner_text() != "rank 1"
    page.select_option("#group", "lost")
    assert cards.count() > 0 and all("lost" in card.inner_text() for card in cards.all())


def test_keys_reach_the_search_and_the_queries(page):
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.type("j")  # a letter, while typing
    assert page.input_value("#search") == "j"
    page.keyboard.press("Escape")
    page.locator("#search").blur()
    for key, place in (("j", 0), ("j", 1), ("k", 0)):
        page.keyboard.press(key)
        focused = "[...document.querySelectorAll('#cards article')].indexOf(document.activeElement)"
        assert page.evaluate(focused) == place


def test_first_tab_skips_to_the_queries(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.url.endswith("#queries")


def test_theme_follows_the_system_and_the_button(page):
    def background():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page.emulate_media(color_scheme="dark")
    dark = background()
    page.emulate_media(color_scheme="light")
    light = background()
    assert dark != light
    page.click("#theme")
    page.click("#theme")
    assert page.locator("#theme").inner_text() == "Theme: dark" and background() == dark
    page.reload()
    assert background() == dark
    page.click("#theme")
    assert background() == light


def test_figures_take_the_colours_of_the_theme(page):
    stroke = "getComputedStyle(document.querySelector('.plots svg [stroke=\"var(--series-1)\"]')).stroke"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(stroke)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(stroke) != light and light.startswith("rgb")


@pytest.mark.parametrize("width", [320, 390, 768])
def test_narrow_screens_do_not_scroll_sideways(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
