"""Log lines, metrics and TensorBoard."""

import json
import os
import re
import sys
import time

import pytest

from clip_retrieval import log as module
from clip_retrieval.errors import format_count, format_counts, format_share
from clip_retrieval.log import log, log_to_file, progress_bar, start_log
from clip_retrieval.reporting.metrics_log import MetricsLog


def test_early_messages_are_in_the_log_file(tmp_path, capsys):
    start_log()
    log.info("early")
    log_to_file(tmp_path)
    log.warning("late")
    captured = capsys.readouterr()
    assert captured.out == "early\n" and captured.err == "WARNING: late\n"
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO early", "WARNING late"]
    start_log()


def test_resume_removes_metrics_after_the_checkpoint(tmp_path):
    first = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        first.write("train", step, {"loss": 1.0 / step})
    first.write("val", 2, {"i2t": {"R@1": 10.0}})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    second = MetricsLog(tmp_path, {"train": 2, "val": -1})
    second.write("val", 2, {"i2t": {"R@1": 50.0}})
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"kind": "train", "step": 1, "loss": 1.0},
        {"kind": "train", "step": 2, "loss": 0.5},
        {"kind": "val", "step": 2, "i2t": {"R@1": 50.0}},
    ]


def test_tensorboard_has_the_same_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = MetricsLog(tmp_path)
    metrics.write("train", 4, {"loss": 0.25})
    metrics.write("val", 4, {"i2t": {"R@1": 50.0}, "rsum": 300.0})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]} == {
        "train/loss": [(4, 0.25)],
        "val/i2t/R@1": [(4, 50.0)],
        "val/rsum": [(4, 300.0)],
    }


@pytest.mark.parametrize("level", [log.info, log.warning])
def test_control_characters_reach_neither_terminal_nor_file(tmp_path, capsys, level):
    """A caption may contain escapes that rename a window or clear the terminal."""
    start_log()
    level("a.jpg: \x1b]0;owned\x07\x1b[2Jred\x9b31m \x00 \r \u2028 " + os.fsdecode(b"caf\xe9") + " 狗\tcafé")
    log_to_file(tmp_path)
    printed = "".join(capsys.readouterr())
    for text in (printed, (tmp_path / "log.txt").read_text(encoding="utf-8")):
        assert text.endswith("\n") and text.isascii() is False
        assert all(character.isprintable() or character in "\n\t" for character in text), repr(text)
        assert "\\x1b]0;owned\\x07" in text and "caf\\udce9 狗" in text and "café" in text
    start_log()


def test_names_in_progress_bars_are_printable():
    name = progress_bar([], desc="a\x1b[2J\nb" + "x" * 1000).desc
    assert name.isprintable() and len(name) <= 500


def test_progress_in_a_pipe_is_a_line_now_and_then(monkeypatch, capsys):
    start_log()
    monkeypatch.setattr(module, "PROGRESS_SECONDS", 0.2)
    for number in progress_bar(range(50), desc="images"):
        time.sleep(0.01)
        log.info(f"line {number}")
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert 1 <= len(lines) <= 3 and "\r" not in captured.err and captured.out.count("\n") == 50
    assert all(re.match(r"images: +\d+%\S* \d+/50 \[", line) for line in lines)


def test_quick_loops_and_other_processes_print_no_progress(monkeypatch, capsys):
    list(progress_bar(range(50)))
    with progress_bar(total=3, initial=1) as bar:
        bar.update(2)
    monkeypatch.setattr(module, "PROGRESS_SECONDS", 0)
    list(progress_bar(range(50), lines=False))
    monkeypatch.setenv("RANK", "1")
    list(progress_bar(range(50)))
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(progress_bar(range(50), desc="images"))
    assert "\r" in capsys.readouterr().err


def test_one_image_is_singular():
    assert format_counts(image=1, caption=2000, pair=0) == "1 image, 2,000 captions, 0 pairs"


def test_nouns_agree_with_their_numbers():
    assert [format_count(number, "class") for number in (0, 1, 2000)] == ["0 classes", "1 class", "2,000 classes"]
    assert format_share(1, 1, "image") == "1 of 1 image is" and format_share(1, 26, "image") == "1 of 26 images is"
    assert format_share(0, 1, "image") == "0 of 1 image are" and format_share(2, 2000, "row") == "2 of 2,000 rows are"
