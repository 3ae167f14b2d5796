"""Readers of features, predictions, results and options."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.faults import tokens
from tests.faults.readers.reader import Reader
from tests.faults.structures import change_json


def _write_lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _make_feature_lines(folder: Path) -> list[Path]:
    vectors = np.random.default_rng(0).normal(size=(3, 4)).tolist()
    images = [{"image_id": i, "feature": vector} for i, vector in enumerate(vectors)]
    texts = [{"text_id": f"t{i}", "feature": vector} for i, vector in enumerate(vectors)]
    return [_write_lines(folder / "a.img_feat.jsonl", images), _write_lines(folder / "a.txt_feat.jsonl", texts)]


def _read_features(path: Path) -> None:
    from clip_retrieval.retrieval.features import read_features

    kind = "image" if path.name.startswith(("image", "a.img")) else "text"
    features = read_features(path, kind)
    [features.name(row) for row in range(len(features.vectors))]
    float(np.asarray(features.vectors, np.float64).sum())
    if path.suffix == ".npy":
        read_features(path, kind, memory_map=True).vectors[:1].sum()


def _make_feature_arrays(folder: Path) -> list[Path]:
    vectors = np.random.default_rng(0).normal(size=(3, 4))
    np.save(folder / "image_features.npy", vectors.astype(np.float32))
    np.save(folder / "text_features.npy", np.asfortranarray(vectors.astype(np.float16)))
    return [folder / "image_features.npy", folder / "text_features.npy"]


def _make_ids(folder: Path) -> list[Path]:
    _make_feature_arrays(folder)
    (folder / "image_ids.json").write_text(json.dumps([1000002, "b", 3]))
    return [folder / "image_ids.json"]


def _read_ids(path: Path) -> None:
    _read_features(path.with_name("image_features.npy"))


def _make_relevance(folder: Path) -> list[Path]:
    _make_feature_arrays(folder)
    np.save(folder / "pairs.npy", np.array([[0, 0], [1, 2], [2, 1]], np.int64))
    np.save(folder / "text_to_image.npy", np.array([0, 1, 2], np.int32))
    return [folder / "pairs.npy", folder / "text_to_image.npy"]


def _read_relevance(path: Path) -> None:
    from clip_retrieval.retrieval.evaluate_features import evaluate_feature_files

    sides = (path.with_name("image_features.npy"), path.with_name("text_features.npy"))
    evaluate_feature_files(*sides, **{path.stem: path}, device="cpu")


def _read_arrays(path: Path) -> None:
    from clip_retrieval.retrieval.evaluate_features import evaluate_feature_files

    _read_features(path)
    np.save(path.with_name("pairs.npy"), np.array([[0, 0], [1, 2], [2, 1]], np.int64))
    sides = (path.with_name("image_features.npy"), path.with_name("text_features.npy"))
    evaluate_feature_files(*sides, pairs=path.with_name("pairs.npy"), normalize=True, device="cpu")


def _make_predictions(folder: Path) -> None:
    gold = [{"text_id": i, "text": "a thing", "image_ids": [i, 7]} for i in range(3)]
    _write_lines(folder / "gold.jsonl", gold)
    _write_lines(folder / "gold.tr.jsonl", [{"image_id": i, "text_ids": [i]} for i in range(3)])
    _write_lines(folder / "predictions.jsonl", [{"text_id": i, "image_ids": [2, 1, 0, 7, 9]} for i in range(3)])


def _make_prediction_file(folder: Path) -> list[Path]:
    _make_predictions(folder)
    return [folder / "predictions.jsonl"]


def _make_gold(folder: Path) -> list[Path]:
    _make_predictions(folder)
    return [folder / "gold.jsonl", folder / "gold.tr.jsonl"]


def _read_predictions(path: Path) -> None:
    from clip_retrieval.retrieval.predictions import score_predictions, transform_to_tr, write_scores

    gold = path if path.name.startswith("gold") else path.with_name("gold.jsonl")
    write_scores(path.with_name("scores.json"), lambda: score_predictions(gold, path.with_name("predictions.jsonl")))
    if path.name == "gold.jsonl":
        transform_to_tr(path)


def _make_results(folder: Path) -> list[Path]:
    recalls = {"R@1": 12.5, "R@5": 50.0, "R@10": 75.0, "MedR": 4, "MeanR": 5.5}
    block = {"dataset": "coco", "split": "test", "model": "ViT-B/32", "precision": "fp32", "images": 8, "captions": 40}
    block |= {"i2t": recalls, "t2i": recalls, "mean_recall": 45.8, "rsum": 275.0, "seconds": {"images": 0.1}}
    (folder / "results.json").write_text(json.dumps(block | {"val": block, "before": block}, indent=2))
    return [folder / "results.json"]


def _read_results(path: Path) -> None:
    from clip_retrieval.reporting.results import read_runs
    from clip_retrieval.reporting.table import markdown_table

    markdown_table(read_runs([path]))


def _make_ranks(folder: Path) -> list[Path]:
    from clip_retrieval.reporting.ranks_file import KINDS

    counts = {"above": [0, 2, 5], "tied": [0, 1, 0], "positives": [1, 2, 1], "queries": [0, 1, 3]}
    counts |= {"ids": ["a.jpg", "b.jpg", "c.jpg"], "images": [0, 0, 3], "texts": [7, -8, 9]}
    np.savez(folder / "ranks.npz", **{name: np.array(counts[name.split("_")[1]]) for name in KINDS})
    return [folder / "ranks.npz"]


def _read_ranks(path: Path) -> None:
    from clip_retrieval.reporting.compare import compare, comparison_table

    comparison_table(compare(path, path, queries=3))


def _make_config(folder: Path) -> list[Path]:
    (folder / "run.yaml").write_text(
        "vision_model: ViT-B/16\nbatch-size: 64\nlr: 1e-4\nrecall_k: [1, 5, 10]\nfreeze_text: yes\n"
        "# a comment\ndataset_root: 'data'\ndataset: csv\nmax_steps: null\n"
    )
    return [folder / "run.yaml"]


def _make_options(folder: Path) -> list[Path]:
    from clip_retrieval.reporting.results import write_options
    from clip_retrieval.run.merge import settle

    write_options(folder, settle({"dataset": "csv", "vision_model": "tiny"}), "cpu (test)")
    return [folder / "options.json"]


def _read_config(path: Path) -> None:
    from clip_retrieval.config import read_config
    from clip_retrieval.run.merge import settle

    settle(read_config(path), {})


RESULTS = (
    Reader("features jsonl", _make_feature_lines, _read_features, tokens.JSON, (change_json,)),
    Reader("features npy", _make_feature_arrays, _read_arrays, tokens.NPY),
    Reader("feature ids", _make_ids, _read_ids, tokens.JSON, (change_json,)),
    Reader("pairs npy", _make_relevance, _read_relevance, tokens.NPY),
    Reader("predictions", _make_prediction_file, _read_predictions, tokens.JSON, (change_json,)),
    Reader("gold", _make_gold, _read_predictions, tokens.JSON, (change_json,)),
    Reader("results.json", _make_results, _read_results, tokens.JSON, (change_json,)),
    Reader("ranks.npz", _make_ranks, _read_ranks, tokens.NPY),
    Reader("config yaml", _make_config, _read_config, tokens.YAML),
    Reader("options.json", _make_options, _read_config, tokens.JSON, (change_json,)),
)
