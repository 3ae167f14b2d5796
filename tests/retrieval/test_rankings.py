"""Rankings for other systems: exact order and scores, and files that their readers accept."""

import json

import numpy as np
import pytest
import torch

from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.evaluation.metrics import report
from clip_retrieval.evaluation.ranks import retrieval_ranks
from clip_retrieval.reporting.results import RANKINGS
from clip_retrieval.retrieval.predictions import score_predictions
from clip_retrieval.retrieval.rankings import save_rankings
from tests.conftest import read_json, read_lines

PAIRS = np.stack([np.arange(24) // 4, np.arange(24)], axis=1)


def make(tmp_path, k=10, **ids):
    """Save the rankings of random features; return the dataset and the float64 scores."""
    rng = np.random.default_rng(0)
    images, captions = rng.normal(size=(6, 5)), rng.normal(size=(24, 5))
    names = [f"my photo {image}.jpg" for image in range(6)]
    files = ImageFiles([f"/data/{name}" for name in names], names)
    dataset = RetrievalDataset("photos", "test", files, [f"a {row} 猫" for row in range(24)], PAIRS, **ids)
    save_rankings(tmp_path, torch.from_numpy(images), torch.from_numpy(captions), dataset, k)
    return dataset, (images, captions)


def test_predictions_have_ids_captions_and_scores(tmp_path):
    image_ids, text_ids = [31, 32, 33, 34, 35, 36], list(range(700, 724))
    dataset, (images, captions) = make(tmp_path, 4, image_ids=image_ids, text_ids=text_ids)
    scores = images @ captions.T
    lines = read_lines(tmp_path / "test_predictions.jsonl")
    assert [line["text_id"] for line in lines] == text_ids
    for row, line in enumerate(lines):
        order = np.argsort(-scores[:, row])[:4]
        assert line["image_ids"] == [image_ids[image] for image in order] and line["text"] == dataset.captions[row]
        assert line["scores"] == pytest.approx(scores[order, row])
    line = read_lines(tmp_path / "test_tr_predictions.jsonl")[2]
    order = np.argsort(-scores[2])[:4]
    assert (line["image_id"], line["text_ids"]) == (33, [700 + row for row in order])
    assert line["texts"] == [f"a {row} 猫" for row in order]


def test_chinese_clip_scores_equal_the_recall(tmp_path):
    _, features = make(tmp_path, image_ids=list(range(6)), text_ids=list(range(24)))
    gold = tmp_path / "test_texts.jsonl"
    gold.write_text(
        "".join(json.dumps({"text_id": t, "text": "a", "image_ids": [i]}) + "\n" for i, t in PAIRS.tolist())
    )
    expected = report(*retrieval_ranks(*features, PAIRS))
    for name, direction in (("test_predictions", "t2i"), ("test_tr_predictions", "i2t")):
        found = score_predictions(gold, tmp_path / f"{name}.jsonl")["scoreJson"]
        assert found["r1"] == pytest.approx(expected[direction]["R@1"])
        assert found["r5"] == pytest.approx(expected[direction]["R@5"])


def test_trec_files_have_one_word_ids_and_the_recall(tmp_path):
    """trec_eval sorts a query's lines by score; fields are separated by spaces."""
    _, features = make(tmp_path)
    expected = report(*retrieval_ranks(*features, PAIRS))
    for direction in ("i2t", "t2i"):
        run = [line.split(" ") for line in (tmp_path / f"test_{direction}.run").read_text().splitlines()]
        qrels = [line.split(" ") for line in (tmp_path / f"test_{direction}.qrels").read_text().splitlines()]
        assert {len(line) for line in run} == {6} and {len(line) for line in qrels} == {4} and len(qrels) == 24
        relevant = {(query, item) for query, _, item, _ in qrels}
        best = {}
        for query, q0, item, place, score, _ in run:
            assert q0 == "Q0" and int(place) >= 1
            best[query] = max(best.get(query, (-np.inf, "")), (float(score), item))
        hits = [(query, item) in relevant for query, (_, item) in best.items()]
        assert 100 * np.mean(hits) == pytest.approx(expected[direction]["R@1"])
    assert "my%20photo%200.jpg" in {line[2] for line in qrels}


def test_evaluation_and_finetune_save_rankings(run, arguments, tmp_path):
    code, out, err = run(*arguments, "--epochs", "1", "--save_rankings", "3")
    assert code == 0, err
    folder = tmp_path / "logs" / "ex0"
    code, out, err = run("--eval", "--resume", folder / "best.pt", "--save_rankings", "2")
    assert code == 0, err
    for place, k in ((folder, 3), (folder / "eval_csv_test", 2)):
        lines = read_lines(place / "test_tr_predictions.jsonl")
        assert len(lines) == read_json(place / "results.json")["images"] == 6
        assert {len(line["texts"]) for line in lines} == {k}
    assert "*.qrels" in out

    # an evaluation without the option leaves no rankings of an earlier one, and no file of others goes
    folder = folder / "eval_csv_test"
    assert {f"test_{name}" for name in RANKINGS} <= {path.name for path in folder.iterdir()}
    for name in ("report.html", "test_notes.run", "val_t2i.run"):
        (folder / name).write_text("an earlier evaluation")
    assert run("--eval", "--resume", folder.parent / "best.pt")[0] == 0
    kept = {"log.txt", "options.json", "ranks.npz", "results.json", "test_notes.run"}
    assert {path.name for path in folder.iterdir()} == kept
    folder = folder.parent
    code, _, err = run("--eval", "--resume", folder / "best.pt", "--save_rankings", "0")
    assert code == 2 and "--save_rankings 0" in err
