"""Results in the formats of other tools, read by their own readers."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub._eval_results import parse_eval_result_entries

from clip_retrieval.files import write_json
from clip_retrieval.reporting.convert import convert_results
from tests.reporting.test_results import block

RESULTS = block(50.0) | {"weights": "openai", "images": 5000, "captions": 25000}
RESULTS["t2i"] = {"R@1": 30.5, "R@5": 56.0, "R@10": 66.75, "MedR": 4.0, "MeanR": 20.0}


def test_clip_benchmark_has_fractions_and_its_own_names():
    found = json.loads(convert_results(RESULTS, "clip_benchmark", language="zh"))
    assert found.pop("metrics") == {
        **{f"image_retrieval_recall@{k}": value for k, value in ((1, 0.305), (5, 0.56), (10, 0.6675))},
        **{f"text_retrieval_recall@{k}": 0.5 for k in (1, 5, 10)},
    }
    assert found == {
        "dataset": "mscoco_captions",
        "model": "ViT-B/32",
        "pretrained": "openai",
        "task": "zeroshot_retrieval",
        "language": "zh",
    }


def test_model_card_is_read_by_huggingface_hub():
    card = ModelCard(convert_results(RESULTS | {"model": "a: 'b' 模型"}, "model_card", dataset_id="org/coco"))
    assert card.data.model_name == "a: 'b' 模型" and len(card.data.eval_results) == 6
    found = {result.metric_type: result for result in card.data.eval_results}
    result = found["image_retrieval_recall_at_5"]
    assert (result.metric_value, result.dataset_type, result.dataset_name) == (56.0, "org/coco", "coco")
    assert result.dataset_split == "test"


def test_eval_results_are_read_by_huggingface_hub():
    entries = parse_eval_result_entries(yaml.safe_load(convert_results(RESULTS, "eval_results", dataset_id="org/coco")))
    values = {entry.task_id: entry.value for entry in entries}
    assert len(values) == 6 and values["image_retrieval_recall_at_10"] == 66.75
    assert {entry.dataset_id for entry in entries} == {"org/coco"} and "5000 images" in entries[0].notes


def test_script_reads_a_run(script, tmp_path):
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "results.json", RESULTS)
    code, out, err = script("convert_results", "run", "--format", "clip_benchmark", "--output", "out.json")
    assert code == 0 and out == "", err
    code, out, _ = script("convert_results", "run/results.json", "--format", "clip_benchmark")
    assert code == 0 and (tmp_path / "out.json").read_text() == out
    code, _, err = script("convert_results", "run", "--format", "eval_results")
    assert code == 2 and "--dataset_id" in err
    write_json(tmp_path / "run" / "results.json", {"training_precision": "fp32", "dataset": "csv"})
    code, _, err = script("convert_results", "run", "--format", "model_card")
    assert code == 2 and "no recalls" in err


@pytest.mark.parametrize("format", ["clip_benchmark", "model_card"])
def test_foreign_files_are_refused(script, tmp_path, format):
    (tmp_path / "other.json").write_text('{"i2t": 3}')
    code, _, err = script("convert_results", "other.json", "--format", format)
    assert code == 2 and "other.json" in err and err.count("\n") == 1
