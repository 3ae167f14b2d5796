"""The page in a real browser: search, similar images, dropped images, keyboard, phone; no errors in the console."""

import os
import shutil
import threading
from pathlib import Path

import pytest
import waitress

from clip_retrieval.search.query import Gallery
from clip_retrieval.search.serve import LIMITS
from clip_retrieval.search.source import INDEX_FOLDER
from clip_retrieval.search.web import make_app
from tests.search.conftest import paint

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<img src=x onerror=document.title='hacked'>\"'.jpg"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def address(photos, index):
    """The address of a server of 80 photographs, some of them with hostile and strange names."""
    for number in range(10, 82):
        paint(photos / f"{number}.jpg", number, (30 + number % 20, 30))
    paint(photos / EVIL, 90)
    paint(photos / os.fsdecode(b"caf\xe9.jpg"), 91)
    assert index()[0] == 0
    gallery = Gallery(photos, photos / INDEX_FOLDER, {})
    server = waitress.create_server(make_app(lambda: gallery), host="127.0.0.1", port=0, threads=4, **LIMITS)
    threading.Thread(target=server.run, daemon=True).start()
    yield f"http://127.0.0.1:{server.effective_port}"
    server.close()


@pytest.fixture
def open_page(browser, address):
    """open_page(**context) opens the page. After the test there must be no error in the console."""
    problems, contexts = [], []

    def open_with(**options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#grid li")
        return page

    yield open_with
    for context in contexts:
        context.close()
    assert problems == []


def titles(page):
    return page.eval_on_selector_all("#grid .photo", "all => all.map(each => each.title)")


def wait_for_results(page, text):
    page.wait_for_function("text => document.getElementById('status').textContent.includes(text)", arg=text)
    page.wait_for_function("() => !document.getElementById('grid').classList.contains('busy')")


def test_text_similar_and_back(open_page):
    page = open_page()
    assert "Some of 80 photographs" in page.inner_text("#status") and page.inner_text("#folder") == "photos"
    start = titles(page)
    page.fill("#text", "a red house")
    page.press("#text", "Enter")
    wait_for_results(page, "The best 60 of 80")
    found = titles(page)
    assert len(found) == 60 and found != start and page.inner_text("#grid li:first-child b") != ""
    page.fill("#not", "a blue car")
    page.press("#not", "Enter")
    page.wait_for_function("first => document.querySelector('.photo').title !== first", arg=found[0])
    page.click("#grid li:nth-child(3) .photo")
    page.wait_for_selector("#chip:not([hidden])")
    wait_for_results(page, "The best 60")
    assert page.inner_text("#grid li:first-child b") == "1.000" and page.input_value("#text") == ""
    page.go_back()
    page.go_back()
    page.wait_for_function("first => document.querySelector('.photo').title === first", arg=found[0])
    assert titles(page) == found and page.input_value("#text") == "a red house"


def test_more_results_are_appended(open_page):
    page = open_page()
    page.fill("#text", "a red house")
    page.press("#text", "Enter")
    wait_for_results(page, "The best 60")
    first = titles(page)
    page.click("#more")
    wait_for_results(page, "The best 80 of 80")
    assert titles(page)[:60] == first and len(set(titles(page))) == 80 and page.is_hidden("#more")


def test_chosen_dropped_and_pasted_image(open_page, photos):
    page = open_page()
    page.set_input_files("#file", str(photos / "20.jpg"))
    wait_for_results(page, "The best 60")
    assert titles(page)[0] == "20.jpg" and page.inner_text("#grid li:first-child b") == "1.000"
    for kind, name in (("drop", "30.jpg"), ("paste", "40.jpg")):
        page.evaluate(
            """([kind, name, bytes]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(bytes)], name, { type: "image/jpeg" }));
                const options = { bubbles: true, cancelable: true, dataTransfer: transfer, clipboardData: transfer };
                if (kind === "paste") return void document.dispatchEvent(new ClipboardEvent("paste", options));
                document.body.dispatchEvent(new DragEvent("dragenter", options));
                if (document.getElementById("drop").hidden) throw Error("no drop zone");
                document.body.dispatchEvent(new DragEvent("drop", options));
            }""",
            [kind, name, list((photos / name).read_bytes())],
        )
        page.wait_for_function("name => document.querySelector('.photo').title === name", arg=name)
    page.click("#chip button")
    wait_for_results(page, "Some of")
    assert page.is_hidden("#chip")


def test_upload_that_is_no_image_says_so(browser, address, tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    page = browser.new_page()
    page.goto(address)
    page.set_input_files("#file", str(tmp_path / "notes.txt"))
    wait_for_results(page, "not a readable image")
    assert page.get_attribute("#status", "class") == "bad" and page.locator("#grid li").count() == 0
    page.close()


def test_keyboard_only(open_page):
    page = open_page()
    page.keyboard.press("ArrowDown")
    focused = "() => document.activeElement.title"
    first = titles(page)
    assert page.evaluate(focused) == first[0]
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == first[1]
    page.keyboard.press("ArrowDown")
    below = page.evaluate(focused)
    page.keyboard.press("ArrowUp")
    assert below not in first[:2] and page.evaluate(focused) == first[1]
    page.keyboard.press("v")
    page.wait_for_selector("#viewer[open]")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#caption") == first[2]
    page.keyboard.press("Escape")
    page.wait_for_selector("#viewer:not([open])", state="attached")
    assert page.evaluate(focused) == first[2]
    page.keyboard.press("Enter")
    wait_for_results(page, "The best 60")
    assert titles(page)[0] == first[2] and page.evaluate(focused) == first[2]
    page.keyboard.press("/")
    page.keyboard.type("a dog")
    page.keyboard.press("Enter")
    page.wait_for_function("() => location.hash.includes('q=a+dog') && location.hash.includes('like=')")


def test_names_are_shown_as_text(open_page):
    page = open_page()
    page.fill("#text", "a dog")
    page.press("#text", "Enter")
    wait_for_results(page, "The best 60")
    page.click("#more")
    wait_for_results(page, "The best 80")
    assert EVIL in titles(page)
    page.locator(".photo").nth(titles(page).index(EVIL)).focus()
    page.keyboard.press("v")
    assert page.inner_text("#caption").startswith(EVIL)
    assert page.title() == "photos – photo search" and page.locator("#viewer img").count() == 1


def test_phone_and_dark(open_page, browser):
    page = open_page(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 20, 23)"
    page.tap("#grid li:first-child .view")
    page.wait_for_selector("#viewer[open]")
    page.tap("#similar")
    wait_for_results(page, "The best 60")
    assert page.is_visible("#chip img")


def test_every_control_has_a_name(open_page):
    page = open_page()
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, a")].filter((each) =>
            !(each.getAttribute("aria-label") || each.textContent.trim() || each.labels?.[0]?.textContent.trim()))
            .map((each) => each.outerHTML)"""
    )
    assert unnamed == [] and page.get_attribute("html", "lang") == "en"


def test_nothing_is_loaded_from_elsewhere():
    static = Path(make_app.__code__.co_filename).parent / "static"
    for path in static.iterdir():
        text = path.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "http:" not in text and "https:" not in text and "//fonts" not in text, path.name
