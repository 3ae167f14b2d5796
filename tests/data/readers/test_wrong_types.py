"""Valid documents with each value replaced by many others: each one is read, or refused in one line.

No reader may raise anything but UserError.
"""

import copy
import json

import numpy as np
import pytest
from PIL import Image

from clip_retrieval.classification.class_names import read_class_names, read_names
from clip_retrieval.config import read_config
from clip_retrieval.data.catalog import read_dataset
from clip_retrieval.data.readers import coco, csv_file, karpathy
from clip_retrieval.data.readers.huggingface import _read_split_names
from clip_retrieval.data.shards.sizes import known_sizes
from clip_retrieval.data.writers.tsv import export_split
from clip_retrieval.errors import UserError, one_line
from clip_retrieval.options import DataOptions, Options
from clip_retrieval.reporting.results import read_runs
from clip_retrieval.reporting.table import markdown_table
from clip_retrieval.retrieval.features import read_features, write_ids
from clip_retrieval.retrieval.predictions import score_predictions, transform_to_tr
from clip_retrieval.run.merge import settle
from tests.data.make_chinese import photo, write_split


def deep(levels):
    """Nested lists."""
    value = []
    for _ in range(levels):
        value = [value]
    return value


VALUES = [None, True, -1, 10**30, 2**63, 1.5, float("nan"), float("inf"), "", "\ud800", "a\0b", "x" * 3000]
VALUES += [[], {}, [[]], {"a": {}}, [None, 1, "a"], deep(700)]


def iter_paths(value, path=()):
    """Yield the path of each value in a document, and of the document itself."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from iter_paths(value[key], (*path, key))


def variants(document):
    """Yield the document with each value replaced by each of VALUES, deleted, and duplicated."""
    for path in iter_paths(document):
        for value in VALUES:
            yield change_at(document, path, lambda holder, key, value=value: holder.__setitem__(key, value))
        if path:
            yield change_at(document, path, lambda holder, key: holder.__delitem__(key))
        if path and isinstance(path[-1], int):
            yield change_at(document, path, lambda holder, key: holder.append(holder[key]))


def change_at(document, path, change):
    holder = parent = [copy.deepcopy(document)]
    for key in (path and (0, *path[:-1])) or ():
        parent = parent[key]
    change(parent, path[-1] if path else 0)
    return holder[0] if holder else None


def check_read_or_refused(read, documents):
    """Check that every document is read, or refused in one line; return the numbers of both."""
    good = bad = 0
    for document in documents:
        for read_and_clear in (coco.read_captions, karpathy.read_karpathy_json, csv_file._read_rows):
            read_and_clear.cache_clear()
        try:
            read(json.dumps(document).encode())
            good += 1
        except UserError as error:
            assert str(error).strip()
            assert "\n" not in one_line(str(error))
            bad += 1
    assert bad and good
    return good, bad


def write_and(path, run):
    """Return a function that writes its argument to `path` and calls run(path)."""

    def read(content):
        path.write_bytes(content)
        return run(path)

    return read


@pytest.fixture
def data(tmp_path):
    """data(name, file) reads all splits of a data set from an annotations file, and writes them again."""
    for number in range(3):
        Image.new("RGB", (8, 8), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")

    def read_file(name):
        def read(path):
            options = DataOptions(dataset=name, annotations=str(path), image_dir=str(tmp_path))
            for split in ("train", "val", "test"):
                if (dataset := read_dataset(options, split)) is not None:
                    export_split(dataset, tmp_path, "out", "name")

        return read

    return read_file


def test_coco(tmp_path, data):
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(2)]
    annotations = [{"id": 10 + number, "image_id": number, "caption": f"caption {number}"} for number in range(2)]
    document = {"images": images, "annotations": annotations, "categories": 0}
    check_read_or_refused(write_and(tmp_path / "a.json", data("coco")), variants(document))


def test_karpathy(tmp_path, data):
    splits = ("train", "test", "val")
    images = [
        {"filename": f"{n}.png", "filepath": "", "split": splits[n], "sentences": [{"raw": f"caption {n}"}]}
        for n in range(3)
    ]
    check_read_or_refused(
        write_and(tmp_path / "a.json", data("karpathy")), variants({"images": images, "dataset": "x"})
    )


def test_chinese_texts(tmp_path):
    write_split(tmp_path, "test", {1: photo(1), "b": photo(2)}, [])

    def read(path):
        dataset = read_dataset(DataOptions(dataset="chinese", dataset_root=str(tmp_path)), "test")
        export_split(dataset, tmp_path / "out", "test")

    (tmp_path / "out").mkdir()
    records = [{"text_id": 7, "text": "红色的包", "image_ids": [1, "b"]}, {"text_id": 8, "text": "狗", "image_ids": []}]
    lines = (
        [record if number == row else other for row, other in enumerate(records)]
        for number in range(2)
        for record in variants(records[number])
    )
    read_lines = write_and(tmp_path / "test_texts.jsonl", read)
    check_read_or_refused(lambda content: read_lines(as_lines(content)), lines)


def as_lines(content):
    return b"\n".join(json.dumps(record).encode() for record in json.loads(content))


def test_predictions_and_answers(tmp_path):
    gold = [{"text_id": n, "text": "x", "image_ids": [n, n + 1]} for n in range(2)]
    predictions = [{"text_id": n, "image_ids": [*range(5), "a"]} for n in range(2)]
    paths = {"gold": tmp_path / "gold_texts.jsonl", "predictions": tmp_path / "predictions.jsonl"}
    for name, records in (("gold", gold), ("predictions", predictions)):
        for other, content in (("gold", gold), ("predictions", predictions)):
            paths[other].write_bytes(as_lines(json.dumps(content)))

        def read(path):
            score_predictions(paths["gold"], paths["predictions"], ks=[1, 5])
            transform_to_tr(paths["gold"])

        read_lines = write_and(paths[name], read)
        lines = ([record, records[1]] for record in variants(records[0]))
        check_read_or_refused(lambda content, read_lines=read_lines: read_lines(as_lines(content)), lines)


def test_features(tmp_path):
    records = [{"image_id": 1, "feature": [0.5, 2]}, {"image_id": "b", "feature": [1, -1]}]

    def read(path):
        write_ids(tmp_path / "written.json", read_features(path, "image").ids)

    lines = ([records[1], record] for record in variants(records[0]))
    read_lines = write_and(tmp_path / "x.jsonl", read)
    check_read_or_refused(lambda content: read_lines(as_lines(content)), lines)
    np.save(tmp_path / "image_features.npy", np.ones((2, 2), np.float32))
    check_read_or_refused(
        write_and(tmp_path / "image_ids.json", lambda path: read(tmp_path / "image_features.npy")), variants([1, "b"])
    )


def test_results(tmp_path):
    metrics = {"R@1": 1.0, "R@5": 2, "R@10": 3.0, "MedR": 1.0}
    document = {"model": "x", "dataset": "coco", "split": "test", "i2t": metrics, "t2i": metrics, "mean_recall": 2.0}
    read = write_and(tmp_path / "results.json", lambda path: markdown_table(read_runs([path])))
    check_read_or_refused(read, variants(document))


def test_sizes_and_splits_of_saved_data(tmp_path):
    import torch

    def sizes(path):
        torch.tensor([size or 0 for size in known_sizes([tmp_path / "a.tar", tmp_path / "b.tar"])])

    documents = [*variants({"a.tar": 10, "b.tar": "12"}), {"a.tar": "9" * 5000}, {"a.tar": "²"}]
    check_read_or_refused(write_and(tmp_path / "sizes.json", sizes), documents)
    check_read_or_refused(
        write_and(tmp_path / "dataset_dict.json", _read_split_names), variants({"splits": ["train", "test"]})
    )


def test_class_names(tmp_path):
    folders = ["n01", "n02", "cat"]
    for document in (
        {"n01": "tench", "n02": "goldfish", "cat": "a cat"},
        {"0": ["n01", "tench"], "1": ["n02", "goldfish"], "2": ["cat", "a cat"]},
        ["tench", "goldfish", "a cat"],
    ):
        for read in (lambda path: read_class_names(path, folders), read_names):
            check_read_or_refused(write_and(tmp_path / "names.json", read), variants(document))


def test_options_as_config(tmp_path):
    flat = Options().flat()
    document = {name: flat[name] for name in ("dataset", "lr", "recall_k", "eval")}
    document |= {"train_data": "a.tar", "versions": {"torch": "2"}}
    read = write_and(tmp_path / "options.json", lambda path: settle(read_config(path), complete=False))
    check_read_or_refused(read, variants(document))
