"""Chinese-CLIP's whole pipeline on real photographs: tsv, LMDB, finetune, features, top k, scores."""

import json

import pytest

from tests.conftest import read_json, read_lines

SPLITS = {"train": 240, "val": 60}


@pytest.fixture
def subset(real_data, tmp_path):
    """A Karpathy JSON with the first images of Flickr8k-CN, no two with the same caption."""
    images = json.loads((real_data / "flickr8k/dataset_flickr8kcn.json").read_text())["images"]
    chosen, seen = [], set()
    for split, number in SPLITS.items():
        kept = 0
        for image in (image for image in images if image["split"] == split):
            captions = {sentence["raw"] for sentence in image["sentences"]}
            if kept < number and len(captions) == len(image["sentences"]) and seen.isdisjoint(captions):
                seen |= captions
                chosen.append(image)
                kept += 1
    path = tmp_path / "subset.json"
    path.write_text(json.dumps({"images": chosen, "dataset": "flickr8kcn"}))
    return path


@pytest.mark.slow
def test_flickr8k_cn_from_import_to_scores(real_data, subset, script, run, tmp_path):
    """The scores of the files equal those of main.py exactly: no captions are equal, so there are no ties."""
    data, tiny = tmp_path / "data", real_data / "chinese_clip_tiny"
    source = ("--dataset", "karpathy", "--annotations", subset, "--image_dir", real_data / "flickr8k/images")
    assert script("export_tsv", *source, "--output", data, "--splits", "train,valid")[0] == 0
    assert script("build_lmdb", "--data_dir", data, "--splits", "train,valid")[0] == 0

    learning = ("--batch_size", "60", "--epochs", "8", "--lr", "3e-4", "--warmup", "10", "--display", "1")
    start = ("--pretrained", tiny / "clip_cn_tiny.pt", "--tokenizer", tiny / "vocab.txt", "--image_cache", "cache")
    lmdb = ("--train_data", data / "lmdb/train", "--val_data", data / "lmdb/valid")
    code, _, error = run(*lmdb, *start, *learning, "--device", "cpu", "--num_workers", "0")
    assert code == 0, error
    losses = [line["loss"] for line in read_lines(tmp_path / "logs/ex0/metrics.jsonl") if line["kind"] == "train"]
    assert len(losses) == 160 and sum(losses[-20:]) < 0.95 * sum(losses[:20])
    results = read_json(tmp_path / "logs/ex0/results.json")
    assert results["val"]["rsum"] > 1.5 * results["before"]["rsum"]  # chance before: the weights are random

    best = tmp_path / "logs/ex0/best.pt"
    evaluated = run("--eval", "--resume", best, "--eval_split", "val", "--device", "cpu", "--num_workers", "0")
    assert evaluated[0] == 0, evaluated[2]
    block = read_json(tmp_path / "logs/ex0/eval_chinese_val/results.json")

    files = ("--image_data", data / "lmdb/valid/imgs", "--text_data", data / "valid_texts.jsonl")
    assert script("extract_features", "--resume", best, *files, "--device", "cpu", "--num_workers", "0")[0] == 0
    feats = ("--image_feats", data / "valid_imgs.img_feat.jsonl", "--text_feats", data / "valid_texts.txt_feat.jsonl")
    for tool, output in (("make_topk_predictions", "t2i.jsonl"), ("make_topk_predictions_tr", "i2t.jsonl")):
        assert script(tool, *feats, "--top_k", "10", "--output", output)[0] == 0
    assert script("transform_ir_annotation_to_tr", "--input", data / "valid_texts.jsonl")[0] == 0
    for direction, gold in (("t2i", "valid_texts.jsonl"), ("i2t", "valid_texts.tr.jsonl")):
        assert script("evaluate_predictions", data / gold, f"{direction}.jsonl", "scores.json")[0] == 0
        scores = read_json(tmp_path / "scores.json")
        assert scores["success"]
        for k in (1, 5, 10):
            assert scores["scoreJson"][f"r{k}"] == pytest.approx(block[direction][f"R@{k}"], abs=1e-9)
