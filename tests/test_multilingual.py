"""Retrieval by language: the layouts of XM3600 and XTD10, and scripts/multilingual.py."""

import json
import re

import numpy as np
import pytest

from clip_retrieval.api import load_model
from clip_retrieval.data.multilingual import read_multilingual
from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.metrics import report
from clip_retrieval.evaluation.ranks import retrieval_ranks
from tests.conftest import read_json

GERMAN, ENGLISH = ["ein rot", "ein alt", "ein neu"], ["a red thing", "a old thing", "a new thing"]


@pytest.fixture
def xm3600(tmp_path):
    """captions.jsonl of three images: one German caption each, two English ones except for the last image."""
    lines = []
    for number in range(3):
        english = [ENGLISH[number], f"another {number}"][: 1 if number == 2 else 2]
        record = {"image/key": str(number), "image/locale": "de", "de": {"caption": [GERMAN[number]]}}
        lines.append(json.dumps(record | {"en": {"caption": english, "caption/tokenized": ["x"]}}))
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def xtd10(tmp_path):
    """The three folders of the published captions, of three images."""
    files = {"XTD10/test_image_names.txt": ["0.jpg", "1.jpg", "2.jpg"], "XTD10/test_1kcaptions_en.txt": ENGLISH}
    for name, lines in (files | {"MIC/test_1kcaptions_de.txt": GERMAN}).items():
        (tmp_path / "xtd" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "xtd" / name).write_text("\n".join(lines) + "\n")
    return tmp_path / "xtd"


def test_xm3600_layout(xm3600, captioned):
    data = read_multilingual(xm3600, captioned)
    assert list(data.languages) == ["de", "en"] and len(data.dataset.images) == 3
    own, pairs = data.languages["en"]
    assert data.dataset.captions[own] == [ENGLISH[0], "another 0", ENGLISH[1], "another 1", ENGLISH[2]]
    assert pairs.tolist() == [[0, 0], [0, 1], [1, 2], [1, 3], [2, 4]]
    own, pairs = read_multilingual(xm3600.parent, captioned, ["en"], first_caption=True).languages["en"]
    assert data.dataset.captions[: own.stop] == GERMAN and pairs.tolist() == [[0, 0], [1, 1], [2, 2]]


def test_xtd10_layout(xtd10, captioned):
    data = read_multilingual(xtd10, captioned)
    assert data.dataset.name == "xtd10" and list(data.languages) == ["de", "en"]
    for language, captions in (("de", GERMAN), ("en", ENGLISH)):
        own, pairs = data.languages[language]
        assert data.dataset.captions[own] == captions and pairs.tolist() == [[0, 0], [1, 1], [2, 2]]


def test_blank_line_of_xtd10_is_an_image_without_a_caption(xtd10, captioned):
    (xtd10 / "MIC/test_1kcaptions_de.txt").write_text("ein rot\n\nein neu\n")
    assert read_multilingual(xtd10, captioned).languages["de"][1].tolist() == [[0, 0], [2, 1]]


def test_bad_files_are_named(xm3600, xtd10, captioned):
    with pytest.raises(UserError, match=r"no captions in fr; it has de, en"):
        read_multilingual(xm3600, captioned, ["fr"])
    (xm3600.parent / "none.jsonl").write_text('{"image/key": "0"}')
    with pytest.raises(UserError, match="no captions in any language; give the published file"):
        read_multilingual(xm3600.parent / "none.jsonl", captioned)
    (xtd10 / "MIC/test_1kcaptions_de.txt").write_text("ein rot\n")
    with pytest.raises(UserError, match=r"test_1kcaptions_de\.txt: has 1 captions"):
        read_multilingual(xtd10, captioned)
    with pytest.raises(UserError, match="holds neither"):
        read_multilingual(captioned, captioned)
    for line, words in (
        ('{"de": {"caption": ["x"]}}', "image/key"),
        ('{"image/key": "0", "de": {"caption": "x"}}', "de has"),
    ):
        xm3600.write_text(line)
        with pytest.raises(UserError, match=f"line 1: .*{words}"):
            read_multilingual(xm3600, captioned)


@pytest.mark.parametrize("layout", ["xm3600", "xtd10"])
def test_results_are_those_of_each_language_alone(script, run, arguments, captioned, tmp_path, request, layout):
    data = request.getfixturevalue(layout)
    assert run(*arguments, "--max_steps", "3")[0] == 0
    best = tmp_path / "logs/ex0/best.pt"
    code, out, err = script("multilingual", "--data", data, "--image_dir", captioned, "--resume", best)
    assert code == 0, err
    results = read_json(best.parent / layout / "results.json")
    model, read = load_model(best, "cpu"), read_multilingual(data, captioned)
    images = model.encode_images(read.dataset.images)
    for language, (own, pairs) in read.languages.items():
        expected = report(*retrieval_ranks(images, model.encode_texts(read.dataset.captions[own]), pairs))
        block = results["languages"][language]
        assert {name: block[name] for name in expected} == expected
        assert re.search(rf"^{language} ", out, re.MULTILINE)
    mean = np.mean([block["t2i"]["R@1"] for block in results["languages"].values()])
    assert results["mean"]["t2i"]["R@1"] == pytest.approx(mean)
    assert max(map(len, out.splitlines()[-6:-1])) <= 80
