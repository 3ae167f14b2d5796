"""scripts/extract_features.py with any model, any data and both formats."""

import json
import shutil

import numpy as np
import pytest

from clip_retrieval.data.writers.build_lmdb import build_lmdb
from clip_retrieval.errors import UserError
from clip_retrieval.extract import ExtractionRequest
from clip_retrieval.retrieval.features import read_features
from tests.conftest import read_json, read_jsonl, write_jsonl
from tests.data.make_chinese import photo, write_sample, write_split
from tests.torchrun import Torchrun


@pytest.fixture
def trained(run, arguments, tmp_path):
    """A checkpoint of ours, and the results of its evaluation."""
    assert run(*arguments, "--max_steps", "3")[0] == 0
    best = tmp_path / "logs/ex0/best.pt"
    assert run("--eval", "--resume", best)[0] == 0
    return best, read_json(tmp_path / "logs/ex0/eval_csv_test/results.json")


def test_checkpoint_needs_no_other_option(script, trained, tmp_path):
    best, results = trained
    code, _, err = script("extract_features", "--resume", best, "--device", "cpu")
    assert code == 0, err
    folder = tmp_path / "logs/ex0/features_csv_test"
    images, texts = (
        read_features(folder / "image_features.npy", "image"),
        read_features(folder / "text_features.npy", "text"),
    )
    assert (len(images.ids), list(texts.ids)) == (results["images"], list(range(results["captions"])))
    assert all(str(name).endswith(".jpg") for name in images.ids)
    assert images.vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(images.vectors, axis=1), 1, rtol=1e-6)

    code, _, err = script(
        *("evaluate_features", "--image_features", folder / "image_features.npy"),
        *("--text_features", folder / "text_features.npy", "--pairs", folder / "pairs.npy", "--results", "out.json"),
    )
    assert code == 0, err
    for direction in ("i2t", "t2i"):
        assert read_json(tmp_path / "out.json")[direction] == results[direction]


def test_scores_of_prediction_files_equal_main(script, trained, tmp_path):
    """No two scores are equal here. With ties at a K, a file would hold only one of the possible orders."""
    best, results = trained
    outputs = ("--image-feat-output-path", "i.jsonl", "--text-feat-output-path", "t.jsonl", "--output", "npy")
    code, _, err = script("extract_features", "--resume", best, *outputs)
    assert code == 0, err
    names = [record["image_id"] for record in read_jsonl(tmp_path / "i.jsonl")]
    answers = {}
    for text, image in np.load(tmp_path / "npy/pairs.npy").tolist():
        answers.setdefault(text, []).append(names[image])
    write_jsonl(tmp_path / "g_texts.jsonl", [{"text_id": t, "image_ids": images} for t, images in answers.items()])
    feats = ("--image-feats", "i.jsonl", "--text-feats", "t.jsonl")
    code, _, err = script("make_topk_predictions", *feats, "--output", "t2i.jsonl", "--tr_output", "i2t.jsonl")
    assert code == 0, err
    for direction in ("i2t", "t2i"):
        assert script("evaluate_predictions", "g_texts.jsonl", f"{direction}.jsonl", "out.json")[0] == 0
        scores = read_json(tmp_path / "out.json")["scoreJson"]
        for k in (1, 5, 10):
            assert scores[f"r{k}"] == pytest.approx(results[direction][f"R@{k}"])


@pytest.fixture
def chinese(tmp_path):
    """DATA with test_imgs.tsv, test_texts.jsonl and lmdb/test."""
    folder = write_sample(tmp_path / "DATA")
    build_lmdb(folder, ["test"])
    return folder


def test_images_and_texts_from_chinese_clips_files(script, trained, chinese):
    best, _ = trained
    flags = ("--extract-image-feats", "--extract-text-feats")
    sources = ("--image-data", chinese / "lmdb/test/imgs", "--text-data", chinese / "test_texts.jsonl")
    sizes = ("--img-batch-size", 2, "--text-batch-size", 1, "--num_workers", 0)
    code, out, err = script("extract_features", "--resume", best, *flags, *sources, *sizes)
    assert code == 0, err
    image_file, text_file = chinese / "test_imgs.img_feat.jsonl", chinese / "test_texts.txt_feat.jsonl"
    assert str(image_file) in out and str(text_file) in out
    images, texts = read_features(image_file, "image"), read_features(text_file, "text")
    assert sorted(images.ids) == [517602, 1000002, 9007199254740993]
    assert texts.ids == [8428, 8429, 9223372036854775807, 2]
    assert list(read_jsonl(image_file)[0]) == ["image_id", "feature"]

    image_file.unlink()
    code, _, err = script("extract_features", "--resume", best, "--image-data", chinese / "test_imgs.tsv")
    assert code == 0, err
    found = read_features(image_file, "image")
    for image_id, vector in zip(found.ids, found.vectors):
        np.testing.assert_allclose(vector, images.vectors[images.ids.index(image_id)], atol=1e-6)

    code, _, err = script("extract_features", "--resume", best, "--dataset", "chinese", "--dataset_root", chinese)
    assert code == 0, err
    folder = best.parent / "features_chinese_test"
    assert sorted(json.loads((folder / "image_ids.json").read_text())) == sorted(images.ids)
    assert set(read_features(folder / "text_features.npy", "text").ids) == set(texts.ids)
    assert len(np.load(folder / "pairs.npy")) == 4


def test_only_texts_and_only_images(script, trained, chinese):
    best, _ = trained
    code, out, err = script("extract_features", "--resume", best, "--text-data", chinese / "test_texts.jsonl")
    assert code == 0 and out.count("wrote") == 1 and "4 text features" in out, err
    code, out, err = script("extract_features", "--resume", best, "--extract-image-feats", "--output", chinese / "o")
    assert code == 0 and [path.name for path in sorted((chinese / "o").iterdir())] == [
        "image_features.npy",
        "image_ids.json",
    ]


def test_text_ids(script, trained, tmp_path):
    folder = write_split(
        tmp_path / "D", "test", {"a b": photo(1), "7": photo(2)}, [("x", "w", ["a b"]), ("9", "v", [7])]
    )
    sources = ("--image-data", folder / "test_imgs.tsv", "--text-data", folder / "test_texts.jsonl")
    code, _, err = script("extract_features", "--resume", trained[0], *sources)
    assert code == 0, err
    assert read_features(folder / "test_imgs.img_feat.jsonl", "image").ids == ["a b", 7]
    assert read_features(folder / "test_texts.txt_feat.jsonl", "text").ids == ["x", "9"]


def test_context_length_cuts_texts_and_random_weights_warn(script, captioned, tmp_path):
    texts = enumerate(["red green blue dark", "red green", "blue"])
    text_data = write_jsonl(tmp_path / "x_texts.jsonl", [{"text_id": i, "text": text} for i, text in texts])
    for length, equal in ((4, True), (5, False)):
        model = ("--vision_model", captioned / "small.json", "--context-length", length)
        code, _, err = script("extract_features", *model, "--text-data", text_data)
        assert code == 0 and "THE WEIGHTS ARE RANDOM" in err
        long, short, other = read_features(tmp_path / "x_texts.txt_feat.jsonl", "text").vectors
        assert np.allclose(long, short, atol=1e-5) == equal and not np.allclose(short, other, atol=1e-5)


@pytest.mark.parametrize(
    "typed, words",
    [
        (["--extract-image-feats", "--text-data", "DATA/test_texts.jsonl"], ["--image_data"]),
        (["--extract-text-feats", "--image-data", "DATA/test_imgs.tsv"], ["--text_data"]),
        (["--text-data", "DATA/none.jsonl"], ["DATA/none.jsonl"]),
        (["--image-data", "DATA/none.tsv"], ["DATA/none.tsv"]),
        (["--img-batch-size", "0"], ["--img_batch_size 0"]),
        (["--dataset", "chinese", "--dataset_root", "DATA", "--eval_split", "val"], ["no val split", "--eval_split"]),
    ],
)
def test_bad_usage_is_one_line(script, captioned, chinese, typed, words):
    code, _, err = script("extract_features", "--vision_model", captioned / "small.json", *typed)
    assert code == 2 and err.count("\n") == 1 and all(word in err for word in words), err


def test_request_includes_images_and_texts(tmp_path):
    def sides(**options):
        request = ExtractionRequest(**options)
        return request.includes_images, request.includes_texts

    assert sides() == (True, True)
    assert sides(extract_text_feats=True) == (False, True)
    assert sides(image_data=tmp_path) == (True, False)
    assert sides(image_data=tmp_path, text_data=tmp_path) == (True, True)
    assert sides(image_data=tmp_path, text_data=tmp_path, extract_text_feats=True) == (False, True)
    with pytest.raises(UserError):
        sides(text_data=tmp_path, extract_image_feats=True)


@pytest.mark.slow
def test_several_processes_write_the_same_files(script, trained, tmp_path):
    best, _ = trained
    single, several = tmp_path / "single", tmp_path / "several"
    sizes = ("--device", "cpu", "--img_batch_size", 2, "--text_batch_size", 3, "--num_workers", 0)
    assert script("extract_features", "--resume", best, "--output", single, *sizes)[0] == 0
    started = Torchrun(
        *("scripts/extract_features.py", "--resume", best, "--output", several, *sizes),
        processes=(2,),
        marker=several,
    )
    code, _, err = started.end()
    assert code == 0, err
    assert sorted(path.name for path in single.iterdir()) == sorted(path.name for path in several.iterdir())
    for path in single.iterdir():
        assert path.read_bytes() == (several / path.name).read_bytes(), path.name


def test_features_equal_chinese_clips(script, real_data, tmp_path):
    """Compared with the features that Chinese-CLIP computes for real photographs, from a checkpoint in its layout."""
    tiny = real_data / "chinese_clip_tiny"
    expected = json.loads((tiny / "expected.json").read_text(encoding="utf-8"))
    images = {i: (real_data / "flickr8k/images" / name).read_bytes() for i, name in enumerate(expected["images"], 100)}
    texts = [
        (1000 * i + n, caption, [i]) for i, of in enumerate(expected["captions"], 100) for n, caption in enumerate(of)
    ]
    folder = write_split(tmp_path / "D", "valid", images, texts)
    shutil.copy(tiny / "vocab.txt", folder)
    code, _, err = script(
        *("extract_features", "--resume", tiny / "clip_cn_tiny.pt", "--tokenizer", folder / "vocab.txt"),
        *("--extract-image-feats", "--extract-text-feats", "--device", "cpu"),
        *("--image-data", folder / "valid_imgs.tsv", "--text-data", folder / "valid_texts.jsonl"),
    )
    assert code == 0, err
    for name, kind in (("imgs.img", "image"), ("texts.txt", "text")):
        found = read_features(folder / f"valid_{name}_feat.jsonl", kind)
        np.testing.assert_allclose(found.vectors, np.load(tiny / f"{kind}_features.npy"), atol=1e-4)
