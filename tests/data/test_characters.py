"""Half surrogate pairs, NULs and bytes that are not UTF-8, in captions, ids and file names."""

import gzip
import json
import logging
import os
import pickle

import lmdb
import numpy as np
import open_clip
import pytest

from clip_retrieval.data.captions import tokenize
from clip_retrieval.data.shards.samples import read_captions
from clip_retrieval.data.writers.build_lmdb import build_lmdb
from clip_retrieval.data.writers.tar_shards import export_shards
from clip_retrieval.data.writers.tsv import export
from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.options import DataOptions
from clip_retrieval.retrieval.features import read_features, write_features
from clip_retrieval.retrieval.predictions import predict, read_lists, score_predictions, transform_to_tr
from tests.data.make_chinese import photo, write_split
from tests.data.make_shards import jpeg, write_shard

CAPTIONS = ["a dog", "half an emoji \ud83d", "\udc36 the other half", "café\ud800!", "whole 🐶"]
FIXED = ["a dog", "half an emoji \ufffd", "\ufffd the other half", "café\ufffd!", "whole 🐶"]
BROKEN = 3


@pytest.fixture
def warnings():
    """The warnings that are logged."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    log.addHandler(handler)
    yield messages
    log.removeHandler(handler)


def write_coco(folder):
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(5)]
    annotations = [{"id": n, "image_id": n, "caption": caption} for n, caption in enumerate(CAPTIONS)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return DataOptions(dataset="coco", annotations=str(folder / "captions.json"), image_dir=str(folder))


def write_karpathy(folder):
    images = [{"filename": f"{n}.jpg", "split": "train", "sentences": [{"raw": c}]} for n, c in enumerate(CAPTIONS)]
    path = folder / "dataset_x.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"images": images}).encode()))
    return DataOptions(dataset="karpathy", annotations=str(path), image_dir=str(folder))


def write_chinese(folder):
    write_split(folder, "train", {n: jpeg(n) for n in range(5)}, [])
    lines = [json.dumps({"text_id": n, "text": text, "image_ids": [n]}) + "\n" for n, text in enumerate(CAPTIONS)]
    (folder / "train_texts.jsonl").write_text("".join(lines))
    return DataOptions(dataset="chinese", dataset_root=str(folder))


def write_surrogates_as_bytes(folder):
    """As in Java's "modified UTF-8": three bytes for each half."""
    options = write_chinese(folder)
    lines = [
        json.dumps({"text_id": n, "text": text, "image_ids": [n]}, ensure_ascii=False) + "\n"
        for n, text in enumerate(CAPTIONS)
    ]
    (folder / "train_texts.jsonl").write_bytes("".join(lines).encode("utf-8", "surrogatepass"))
    return options


def write_lmdb(folder):
    """As Chinese-CLIP's own script builds it, with any text."""
    options = write_chinese(folder)
    build_lmdb(folder, ["train"])
    with lmdb.open(str(folder / "lmdb/train/pairs")) as env, env.begin(write=True) as transaction:
        for n, text in enumerate(CAPTIONS):
            transaction.put(str(n).encode(), pickle.dumps((n, n, text)))
    return options


def write_tar(folder):
    samples = [(f"{n}", {"jpg": jpeg(n), "json": json.dumps({"caption": [c]})}) for n, c in enumerate(CAPTIONS)]
    write_shard(folder / "train-0.tar", samples)
    return DataOptions(dataset="webdataset", dataset_root=str(folder))


LAYOUTS = [write_coco, write_karpathy, write_chinese, write_surrogates_as_bytes, write_lmdb, write_tar]


@pytest.fixture(params=LAYOUTS, ids=lambda write: write.__name__)
def options(request, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    return request.param(folder)


def read(options):
    from clip_retrieval.data.catalog import read_dataset

    return read_dataset(options, "train")


def test_captions_of_every_reader_are_fixed_and_counted(options, warnings):
    warnings.clear()
    dataset = read(options)
    assert list(dataset.captions) == FIXED
    assert len(warnings) == 1 and f"{BROKEN} of {len(FIXED)} captions are damaged, with U+FFFD" in warnings[0]
    assert len(tokenize(dataset.captions, open_clip.get_tokenizer("ViT-B-32")).ids) == 5


def test_fixed_captions_are_exported_and_read_back(options, tmp_path):
    export(options, tmp_path / "tsv", ["train"])
    export_shards(options, tmp_path / "shards", ["train"])
    tsv = DataOptions(dataset="chinese", dataset_root=str(tmp_path / "tsv"))
    assert list(read(tsv).captions) == FIXED
    build_lmdb(tmp_path / "tsv", ["train"])
    assert list(read(tsv).captions) == FIXED
    shards = DataOptions(dataset="webdataset", dataset_root=str(tmp_path / "shards"))
    assert list(read(shards).captions) == FIXED


def test_valid_captions_give_no_warning(tmp_path, warnings):
    write_shard(tmp_path / "train-0.tar", [("a", {"jpg": jpeg(0), "json": json.dumps({"caption": "a 🐶, 狗"})})])
    read(DataOptions(dataset="webdataset", dataset_root=str(tmp_path)))
    assert warnings == []


def test_streamed_captions_are_fixed():
    assert read_captions(json.dumps({"caption": CAPTIONS}).encode(), "json", None) == FIXED


def test_texts_without_images_are_stored_in_an_lmdb(tmp_path):
    write_split(tmp_path, "test", {1: photo(1)}, [])
    lines = [{"text_id": 1, "text": "x", "image_ids": [1]}, {"text_id": "\ud83d", "text": "\ud83d", "image_ids": []}]
    (tmp_path / "test_texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    build_lmdb(tmp_path, ["test"])
    from clip_retrieval.data.catalog import read_dataset

    dataset = read_dataset(DataOptions(dataset="chinese", dataset_root=str(tmp_path)), "test")
    assert dataset.captions == ["x", "\ufffd"] and dataset.text_ids == [1, "\ud83d"]


@pytest.mark.parametrize("ending", ["npy", "jsonl"])
def test_ids_of_features_and_predictions_are_read_back(tmp_path, ending):
    ids = ["\ud83d", os.fsdecode(b"\xff.jpg"), "a\0b", "狗", -7, 10**30]
    vectors = np.eye(6, dtype=np.float32)
    paths = {kind: tmp_path / f"{kind}_features.{ending}" for kind in ("image", "text")}
    for kind, path in paths.items():
        write_features(path, kind, ids, vectors)
        assert list(read_features(path, kind).ids) == ids
    outputs = {"t2i": tmp_path / "p.jsonl"}
    predict(paths["image"], paths["text"], outputs, top_k=2, device="cpu")
    assert list(read_lists(outputs["t2i"]).of) == ids
    gold = [json.dumps({"text_id": item, "image_ids": [item]}) for item in ids]
    (tmp_path / "g_texts.jsonl").write_text("\n".join(gold))
    assert score_predictions(tmp_path / "g_texts.jsonl", outputs["t2i"], [1])["score"] == 100
    assert list(read_lists(transform_to_tr(tmp_path / "g_texts.jsonl"), are_answers=True).of) == ids


NAMES = [
    "\ud800/a.jpg",
    "a\ud800.jpg",
    "sub\0dir/a.jpg",
    "a\0.jpg",
    "x" * 300 + "/a.jpg",
    "x" * 5000,
    "/\0/\ud83d",
    "/",
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name[:9]))
@pytest.mark.parametrize("layout", ["coco", "karpathy"])
def test_invalid_image_names(tmp_path, name, layout):
    content = {
        "coco": {
            "images": [{"id": 1, "file_name": name}],
            "annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}],
        },
        "karpathy": {"images": [{"filename": name, "split": "train", "sentences": [{"raw": "a dog"}]}]},
    }[layout]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="1 of 1 image is missing"):
        read(DataOptions(dataset=layout, annotations=str(tmp_path / "a.json"), image_dir=str(tmp_path)))


def test_folder_loops_hold_no_images(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a.csv").write_text("image,caption\nloop/a.jpg,a dog\na.csv/b.jpg,a cat\n")
    with pytest.raises(UserError, match="2 of 2 images are missing"):
        read(DataOptions(dataset="csv", annotations=str(tmp_path / "a.csv")))


@pytest.mark.parametrize("ids", ["number", "name"])
def test_image_names_that_are_not_utf_8(tmp_path, ids):
    """JSON can hold such names: os.fsdecode turns a byte into half a surrogate pair."""
    names = [os.fsdecode(name) for name in (b"\xff.jpg", b"\xfe.jpg", b"caf\xe9/\xff\xfe.jpg", b"tab\there.jpg")]
    for number, name in enumerate(names):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    images = [{"filename": name, "split": "train", "sentences": [{"raw": f"dog {n}"}]} for n, name in enumerate(names)]
    (tmp_path / "a.json").write_text(json.dumps({"images": images}))
    options = DataOptions(dataset="karpathy", annotations=str(tmp_path / "a.json"), image_dir=str(tmp_path / "images"))
    dataset = read(options)
    assert [dataset.images.encoded(n) for n in range(4)] == [jpeg(n) for n in range(4)]
    export(options, tmp_path / "tsv", ["train"], ids)
    again = read(DataOptions(dataset="chinese", dataset_root=str(tmp_path / "tsv")))
    assert again.captions == dataset.captions and np.array_equal(again.pairs, dataset.pairs)
    assert [again.images.encoded(n) for n in range(4)] == [jpeg(n) for n in range(4)]


def test_ids_that_are_equal_in_a_tsv_are_refused(tmp_path):
    samples = [("a\tb", {"jpg": jpeg(1), "txt": "one"}), ("a b", {"jpg": jpeg(2), "txt": "two"})]
    write_shard(tmp_path / "train-0.tar", samples)
    options = DataOptions(dataset="webdataset", dataset_root=str(tmp_path))
    with pytest.raises(UserError, match="have the same name, a b"):
        export(options, tmp_path / "tsv", ["train"])


@pytest.mark.parametrize("dataset", ["coco", "karpathy"])
def test_ids_beyond_64_bits(tmp_path, dataset):
    ids = [2**63, 2**64 + 5, -(2**70), 3]
    for number, _ in enumerate(ids):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    images = [{"id": item, "file_name": f"{n}.jpg", "imgid": item} for n, item in enumerate(ids)]
    annotations = [{"id": 7 - item, "image_id": item, "caption": f"dog {n}"} for n, item in enumerate(ids)]
    for image, annotation in zip(images, annotations):
        image |= {"filename": image["file_name"], "split": "train", "sentences": [{"raw": annotation["caption"]}]}
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    found = read(DataOptions(dataset=dataset, annotations=str(tmp_path / "a.json"), image_dir=str(tmp_path)))
    described = {found.captions[caption]: found.images.name(image)[-5:] for image, caption in found.pairs.tolist()}
    assert described == {f"dog {n}": f"{n}.jpg" for n in range(4)}
