"""The page is complete without a network, escapes all texts, and embeds each picture once."""

import base64
import hashlib
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.errors import UserError
from clip_retrieval.reporting.html.page import tabulate
from clip_retrieval.reporting.html.thumbnails import SIDE, Thumbnails
from clip_retrieval.reporting.html.write import describe_rerank, list_further, list_zero_shot, write_report
from tests.reporting.html.conftest import HOSTILE, HOSTILE_NAME, make_run


class Page(HTMLParser):
    """The elements, scripts and texts of a page."""

    def __init__(self, content):
        super().__init__()
        self.elements, self.texts, self.inside = [], {}, None
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag

    def handle_data(self, data):
        self.texts.setdefault(self.inside, []).append(data)


@pytest.fixture
def page(photos, tmp_path):
    def write(*runs):
        write_report(tmp_path / "report.html", *runs)
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


def test_page_refers_to_nothing_outside(photos, page):
    content = page(make_run(photos, 0.8))
    for _, attributes in Page(content).elements:
        assert not attributes.keys() & {"style", "action", "srcset"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/webp;base64,"))
    assert "url(http" not in content and "@import" not in content


def test_policy_allows_only_the_own_script_and_styles(photos, page):
    content = page(make_run(photos, 0.8))
    parsed = Page(content)
    policy = next(a["content"] for _, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
    hashes = {}
    for tag in ("script", "style"):
        (body,) = re.findall(f"<{tag}>(.*?)</{tag}>", content, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
    assert f"script-src 'sha256-{hashes['script']}'" in policy and f"style-src 'sha256-{hashes['style']}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_hostile_texts_are_escaped(photos, page):
    run = make_run(photos, 0.8, name=HOSTILE, weights=HOSTILE)
    run = replace(run, results=run.results | {"before": run.results | {"i2t": HOSTILE}})
    content = page(run, replace(run, name="<b>other</b>"))
    assert "\x1b" not in content and r"caf\udce9 \x1b[31m" in content
    parsed = Page(content)
    tags = [tag for tag, _ in parsed.elements]
    assert tags.count("script") == 1 and "b" not in tags
    assert all(attributes.keys() & {"id", "data-of"} for tag, attributes in parsed.elements if tag == "img")
    pictures = [attributes for tag, attributes in parsed.elements if tag == "img"]
    assert any(attributes["alt"] == HOSTILE for attributes in pictures)
    assert any(attributes["title"].endswith(HOSTILE_NAME) for attributes in pictures)


def test_long_captions_are_cut(photos, page):
    captions = [caption + " very" * 10**5 for caption in photos.captions]
    content = page(make_run(replace(photos, captions=captions), 0.8))
    assert len(content) < 2 * 10**6 and content.count(" very very") > 48 and "…</span>" in content


def test_each_picture_is_embedded_once_with_an_alt_text(photos, page):
    pictures = [attributes for tag, attributes in Page(page(make_run(photos, 0.8))).elements if tag == "img"]
    embedded = [attributes["id"] for attributes in pictures if "src" in attributes]
    assert len(set(embedded)) == len(embedded) <= len(photos.images) < len(pictures)
    assert {attributes["data-of"] for attributes in pictures if "src" not in attributes} <= set(embedded)
    assert all(attributes["alt"] and int(attributes["width"]) for attributes in pictures)


def test_thumbnails_are_small_and_keep_their_shape(tmp_path):
    Image.new("RGB", (900, 300), "red").save(tmp_path / "wide.png")
    thumbnails = Thumbnails(ImageFiles([str(tmp_path / "wide.png")]))
    uri, size = thumbnails.embed(0)
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert image.size == size == (SIDE, 75) and image.convert("RGB").getpixel((9, 9))[0] > 230
    assert thumbnails.embed(0) == ("", size)


def test_an_unreadable_picture_becomes_its_caption(photos, page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    paths = [str(tmp_path / "broken.png")] * len(photos.images)
    parsed = Page(page(make_run(replace(photos, images=ImageFiles(paths)), 0.8)))
    assert not any(tag == "img" for tag, _ in parsed.elements)
    assert any(attributes.get("class") == "missing" for _, attributes in parsed.elements)


def test_table_has_intervals_and_the_results_before():
    block = {"i2t": {"R@1": 50.0, "MedR": 2.0}, "t2i": {"R@1": 40.0, "MedR": 3.0}, "rsum": 300.0, "mean_recall": 50.0}
    before = block | {"intervals": {"i2t": {"R@1": [45.0, 55.0]}, "t2i": "damaged", "rsum": [280, 310]}}
    table = tabulate({"before": before, "after": block})
    columns, rows = table.columns, table.rows
    assert columns == ["R@1", "MedR", "mean recall", "rsum"]
    assert [(label, direction) for label, direction, _ in rows] == [
        (label, direction) for label in ("before", "after") for direction in ("i2t", "t2i")
    ]
    cells = rows[0][2]
    assert [(cell.value, cell.interval) for cell in cells] == [(50, (45, 55)), (2, None), (50, None), (300, (280, 310))]
    assert [cell.value for cell in rows[1][2]] == [40, 3, None, None]
    assert not any(cell.interval for _, _, cells in rows[1:] for cell in cells)


def test_page_shows_intervals_and_a_warning_of_trained_images(photos, page):
    interval = {"i2t": {"R@1": [11.25, 22.25]}}
    content = page(make_run(photos, 0.8, intervals=interval, images_trained_on=7))
    assert "11.2–22.2" in content and "95% bootstrap interval" in content
    assert "trained on 7 of these images" in content
    assert "bootstrap" not in page(make_run(photos, 0.8))


def test_before_and_val_are_listed_if_the_split_is_the_same(photos, page):
    block = make_run(photos, 0.8).results
    content = page(make_run(photos, 0.8, before=block, val=block | {"split": "val"}))
    assert all(label in content for label in ("test, before training", "test, trained", "val, trained"))
    assert "before training" not in page(make_run(photos, 0.8, before=block | {"split": "val"}))


def test_runs_of_other_data_are_refused(photos, page):
    captions = [*photos.captions[:-1], "another caption"]
    for other in (replace(photos, captions=captions), replace(photos, images=ImageFiles(photos.images.paths[::-1]))):
        with pytest.raises(UserError, match=r"not the same.*--dataset"):
            page(make_run(photos, 0.8), make_run(other, 0.8))


def test_two_runs_of_one_name_are_told_apart(photos, page):
    content = page(make_run(photos, 0.8), make_run(photos, 0.3))
    assert "run (1) and run (2)" in content and "only run (2)" in content


def test_protocols_reranking_and_retention_are_a_second_table(photos, page):
    recalls = {d: {"R@1": 11.25, "R@5": 2.0, "R@10": 3.0} for d in ("i2t", "t2i")}
    precisions = {"t2i": {"R-P": 4.25, "mAP@R": 5.0}, "intervals": {"t2i": {"R-P": [4.125, 4.5]}}}
    results = {
        "protocols": {"eccv": {"i2t": recalls["i2t"], **precisions}, "<b>": "damaged"},
        "rerank": {"qb_norm": {"t2i": recalls["t2i"], "uses": "<i>captions", "temperature": 0.05, "chosen_on": "val"}},
        "retention_before": recalls | {"dataset": "other", "split": "test", "rsum": 71.125},
        "retention": recalls | {"dataset": "other", "split": "test", "rsum": 61.125},
        "zero_shot_before": {"dataset": "cifar10", "split": "test", "top1": 31.5, "top5": "high"},
        "zero_shot": {"dataset": "cifar10", "split": "test", "top1": 21.5, "top5": 60.0},
    }
    content = page(make_run(photos, 0.8, **results))
    second = content[content.index('id="further-title"') : content.index("Queries whose first item is wrong")]
    for text in (
        "ECCV Caption",
        "4.25<small>4.1–4.5</small>",
        "re-ranked, qb_norm",
        "71.12",
        "61.12",
        "31.50",
        "21.50",
    ):
        assert text in second, text
    assert second.count("image to text") == 3  # re-ranking with qb_norm has only the other direction
    assert "qb_norm: uses &lt;i&gt;captions; temperature 0.05 (val)" in second
    assert second.index("other test, before training") < second.index("other test, trained")
    assert [label for label, _ in list_further(results, "a: ")][:2] == ["a: ECCV Caption", "a: re-ranked, qb_norm"]
    assert not list(list_further({}, "")) and not tabulate({}).rows


@pytest.mark.parametrize("value", [3, [], {"x": 1}, {"x": {}}, {"x": {"i2t": 3, "t2i": {"R@1": "y"}}}])
def test_damaged_results_of_a_second_table_are_left_out(value):
    results = dict.fromkeys(("protocols", "rerank", "retention", "zero_shot"), value)
    cells = [cell for _, _, row in tabulate(dict(list_further(results, ""))).rows for cell in row]
    assert all(cell.value is None for cell in cells) and len(list(describe_rerank(results))) <= 1
    assert all(values == (None, None) for _, values in list_zero_shot(results, ""))


def test_numbers_beyond_a_float_are_left_out(photos, page):
    huge = 10**400
    block = {"i2t": {"R@1": huge}, "k": huge, "top1": huge, "rsum": huge, "intervals": {"i2t": {"R@1": [huge, huge]}}}
    results = {"protocols": {"x": block}, "rerank": {"x": block}, "retention": block, "zero_shot": block}
    assert "0000000000" not in page(make_run(photos, 0.8, **results))
