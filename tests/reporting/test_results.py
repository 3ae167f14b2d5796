import json
import re

import pytest

from clip_retrieval.errors import UserError
from clip_retrieval.files import write_json
from clip_retrieval.reporting.results import read_results, read_runs
from clip_retrieval.reporting.table import markdown_table, protocols_table, results_table, sort_rows


def block(value):
    metrics = {"R@1": value, "R@5": value, "R@10": value, "MedR": 1.0, "MeanR": 2.0}
    names = {"dataset": "coco", "split": "test", "model": "ViT-B/32"}
    return {**names, "i2t": metrics, "t2i": metrics, "mean_recall": value, "rsum": 6 * value}


def test_tables_round_and_results_do_not(tmp_path):
    results = block(100 / 3)
    write_json(tmp_path / "results.json", results)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    table = results_table({"before": block(1.0), "test": results})
    assert "33.33" in table and "200.00" in table and len({len(line) for line in table.splitlines()}) == 1
    markdown = markdown_table(read_runs([tmp_path / "results.json"]))
    assert markdown.splitlines()[2].startswith("| ViT-B/32 | coco test | 33.33 |")


def test_tables_fit_80_columns_whatever_the_metrics():
    metrics = {f"R@{k}": 100.0 for k in (1, 5, 10, 20, 50, 100)} | {"mAP@10": 100.0, "MedR": 12345.0, "MeanR": 12345.6}
    wide = {"i2t": metrics, "t2i": metrics, "mean_recall": 100.0, "rsum": 600.0}
    for blocks in ({"before, test": block(1.0), "val": block(2.0)}, {"before, test": wide, "val": wide}):
        table = results_table(blocks)
        assert max(len(line) for line in table.splitlines()) <= 80
        assert all(name in table for name in (*next(iter(blocks.values()))["i2t"], "mean", "rsum"))


def test_intervals_are_half_widths_below_the_figures():
    wide = block(50.0) | {"intervals": {name: {"R@1": [48.5, 51.0]} for name in ("i2t", "t2i")}}
    wide["intervals"] |= {"mean_recall": [49.0, 51.0], "rsum": [294.0, 306.0]}
    lines = results_table({"before": block(1.0), "test": wide}).splitlines()
    assert [line.split() for line in lines[5:7]] == [["±", "1.25", "1.00", "6.00"], ["t2i", *lines[6].split()[1:]]]
    assert lines[7].split() == ["±", "1.25"] and "95%" in lines[8]


def test_protocols_are_one_table_of_the_metrics_that_exist():
    blocks = {name: {"R@1": 60.0, "R@5": 80.0, "R@10": 90.0, "MedR": 1.0} for name in ("i2t", "t2i")}
    protocols = {"coco_1k": blocks, "map_at_r": {name: {"R-P": 33.333, "mAP@R": 100.0} for name in ("i2t", "t2i")}}
    lines = protocols_table(protocols).splitlines()
    assert lines[0].split() == ["protocol", "R@1", "R@5", "R@10", "R-P", "mAP@R"] and max(map(len, lines)) <= 80
    assert lines[2].split() == ["coco_1k", "i2t", "60.00", "80.00", "90.00"]
    assert lines[5].split() == ["t2i", "33.33", "100.00"] and len(lines[5]) == len(lines[0])
    spans = {"intervals": {"t2i": {"R@1": [59.0, 62.0], "R@10": [80.0, 90.0], "MedR": [1.0, 1.0]}}}
    lines = protocols_table({"coco_1k": blocks | spans}).splitlines()
    assert lines[4].split() == ["±", "1.50", "5.00"] and lines[4].index("5.00") + 4 == len(lines[3]) and len(lines) == 5
    assert "R@1" not in protocols_table({"map_at_r": protocols["map_at_r"]})


def write_run(folder, results, **options):
    folder.mkdir(parents=True)
    write_json(folder / "results.json", results)
    write_json(folder / "options.json", options)
    return folder


def cells(line):
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_runs_are_rows_with_options_and_scores_before(tmp_path):
    first = write_run(tmp_path / "logs/a", block(10.0) | {"before": block(2.0)}, loss="siglip", lr=1e-5)
    write_run(tmp_path / "logs/b", block(20.0) | {"split": "val"}, loss="infonce", lr=3e-4)
    trained = {"model": "tiny", "dataset": "csv", "training_precision": "fp32", "steps": 4}
    write_run(tmp_path / "logs/no|split", trained, lr="broken")
    (tmp_path / "logs/unfinished").mkdir()
    write_run(tmp_path / "logs/zero_shot", {"top1": 50.0})  # skipped
    rows = read_runs([tmp_path / "logs"])
    lines = [dict(zip(rows[0], cells(line))) for line in markdown_table(rows).splitlines()[2:]]
    assert [line["run"] for line in lines] == ["a", "b", r"no\|split"]
    assert lines[0]["rsum"] == "60.00" and lines[0]["rsum before"] == "12.00"
    assert (lines[0]["loss"], lines[0]["lr"], lines[0]["path"]) == ("siglip", "1e-05", str(first))
    assert lines[1]["data"] == "coco val" and lines[1]["lr"] == "0.0003" and lines[1]["rsum before"] == ""
    assert lines[2]["model"] == "tiny" and lines[2]["rsum"] == lines[2]["lr"] == ""
    assert [row["run"] for row in sort_rows(rows, "rsum")] == ["b", "a", "no|split"]
    assert [row["run"] for row in sort_rows(rows, "loss")] == ["b", "a", "no|split"]
    with pytest.raises(UserError, match=r"--sort colour: no such column; choose from model, data, .*rsum"):
        sort_rows(rows, "colour")


def test_only_folders_without_results_are_an_error(tmp_path, script):
    code, out, err = script("results_table", tmp_path)
    assert code == 2 and not out and "no results.json" in err


@pytest.mark.parametrize("content", [None, "no json", "[1, 2]", '{"i2t": {}}', '{"model": "tiny"}', '{"before": 1}'])
def test_other_content_than_results_is_refused(tmp_path, content):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_results(path)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing/results\.json"):
        write_json(tmp_path / "missing" / "results.json", {})
