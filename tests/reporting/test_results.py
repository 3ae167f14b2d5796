import json
import re

import pytest

from clip_retrieval.errors import UserError
from clip_retrieval.files import write_json
from clip_retrieval.reporting.results import read_results
from clip_retrieval.reporting.table import markdown_table, results_table


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
    markdown = markdown_table([read_results(tmp_path / "results.json")])
    assert markdown.splitlines()[2].startswith("| ViT-B/32 | coco test | 33.33 |")


@pytest.mark.parametrize("content", [None, "no json", "[1, 2]", '{"i2t": {}}'])
def test_other_content_than_results_is_refused(tmp_path, content):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_results(path)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing/results\.json"):
        write_json(tmp_path / "missing" / "results.json", {})
