"""Protocols against the eccv-caption package's own metrics and against plain loops."""

import json
import warnings

import numpy as np
import pytest
import torch

from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.data.readers.annotations import ANNOTATIONS, read_ids
from clip_retrieval.errors import UserError
from clip_retrieval.evaluation import protocols as module
from clip_retrieval.evaluation.metrics import report
from clip_retrieval.evaluation.protocols import check_protocols, choose_protocols, read_positives, score_protocols
from clip_retrieval.evaluation.ranks import retrieval_ranks


def make_dataset(pairs, name="coco", split="test", image_ids=None, text_ids=None):
    images, captions = pairs.max(axis=0) + 1
    files = ImageFiles([f"{image}.jpg" for image in range(images)])
    return RetrievalDataset(name, split, files, ["a"] * captions, pairs, image_ids, text_ids)


@pytest.fixture(scope="module")
def coco():
    """COCO's test split without its photographs and captions."""
    package = pytest.importorskip("eccv_caption")
    text_ids = read_ids(ANNOTATIONS / "coco_test_ids.npy").tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ujson is missing
        metrics = package.Metrics()
    image_ids = list(dict.fromkeys(metrics.coco_gts["t2i"][text_id][0] for text_id in text_ids))
    pairs = np.stack([np.arange(25000) // 5, np.arange(25000)], axis=1)
    return make_dataset(pairs, image_ids=image_ids, text_ids=text_ids), metrics


def make_features(kind):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(5000, 16))
    noise = {"random": 100.0, "structured": 1.0}[kind]
    captions = images.repeat(5, axis=0) + noise * rng.normal(size=(25000, 16))
    return torch.from_numpy(images).float(), torch.from_numpy(captions).float()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "structured"])
def test_numbers_equal_those_of_the_eccv_package(coco, kind):
    dataset, metrics = coco
    images, captions = make_features(kind)
    found = score_protocols(["coco_1k", "eccv", "cxc"], images, captions, dataset)
    # the first 60 items of each query, and for the folds the first 10 of its own fold
    scores = images.double() @ captions.double().T
    folds = torch.full_like(scores, -torch.inf)
    for start in range(0, 5000, 1000):
        block = slice(start, start + 1000), slice(5 * start, 5 * start + 5000)
        folds[block] = scores[block]
    ids = {"i2t": (dataset.image_ids, dataset.text_ids), "t2i": (dataset.text_ids, dataset.image_ids)}

    def rank(matrix, k):
        ranked = {}
        for direction, (queries, items) in ids.items():
            top = (matrix if direction == "i2t" else matrix.T).topk(k).indices.tolist()
            ranked[direction] = {query: [items[row] for row in rows] for query, rows in zip(queries, top)}
        return ranked

    ranked, ranked_in_folds = rank(scores, 60), rank(folds, 10)
    expected = {f"cxc R@{k}": metrics.cxc_recalls(ranked, "all", K=k) for k in (1, 5, 10)}
    expected |= {f"eccv R@{k}": metrics.eccv_recalls(ranked, "all", K=k) for k in (1, 5, 10)}
    expected |= {f"coco_1k R@{k}": metrics.coco_1k_recalls(ranked_in_folds, "all", K=k) for k in (1, 5, 10)}
    eccv = metrics.eccv_metrics(ranked, "all")
    expected |= {"eccv R-P": eccv["eccv_rprecision"], "eccv mAP@R": eccv["eccv_map_at_r"]}
    for name, values in expected.items():
        protocol, metric = name.split()
        for direction, value in values.items():
            assert found[protocol][direction][metric] == pytest.approx(100 * value, abs=1e-9), (name, direction)
    assert found["coco_1k"]["folds"] == 5 and "R-P" not in found["cxc"]["t2i"]


def test_folds_are_the_mean_of_their_reports(monkeypatch):
    monkeypatch.setattr(module, "FOLD", 4)
    rng = np.random.default_rng(1)
    pairs = np.unique(np.stack([rng.integers(10, size=40), rng.integers(25, size=40)], axis=1), axis=0)
    images, captions = torch.from_numpy(rng.normal(size=(10, 3))), torch.from_numpy(rng.normal(size=(25, 3)))
    found = score_protocols(["coco_1k"], images, captions, make_dataset(pairs))["coco_1k"]
    blocks = []
    for start in (0, 4):  # the last two images are no full fold
        own = [(image - start, text) for image, text in pairs if start <= image < start + 4]
        texts = sorted({text for _, text in own})
        fold = np.array([(image, texts.index(text)) for image, text in own])
        blocks.append(report(*retrieval_ranks(images[start : start + 4], captions[texts], fold)))
    assert found["rsum"] == pytest.approx(np.mean([block["rsum"] for block in blocks]))
    for direction in ("i2t", "t2i"):
        for name, value in found[direction].items():
            assert value == pytest.approx(np.mean([block[direction][name] for block in blocks]))


def test_intervals_of_the_folds_draw_the_images_of_each_fold(monkeypatch):
    monkeypatch.setattr(module, "FOLD", 4)
    rng = np.random.default_rng(1)
    pairs = np.stack([np.arange(16) // 2, np.arange(16)], axis=1)
    images, captions = torch.from_numpy(rng.normal(size=(8, 3))), torch.from_numpy(rng.normal(size=(16, 3)))
    found = score_protocols(["coco_1k"], images, captions, make_dataset(pairs))["coco_1k"]
    hits = []  # R@1 of the captions of each image
    for start in (0, 4):
        scores = images[start : start + 4] @ captions[2 * start : 2 * start + 8].T
        right = (scores.argmax(dim=0) == torch.arange(8) // 2).double()
        hits.append(100 * right.view(4, 2).mean(dim=1).numpy())
    samples = np.zeros(1000)
    for start, own in zip((0, 4), hits):
        samples += own[np.random.default_rng(start).integers(4, size=(1000, 4))].mean(axis=1) / 2
    assert found["intervals"]["t2i"]["R@1"] == pytest.approx(np.quantile(samples, [0.025, 0.975]))
    assert found["intervals"].keys() == found.keys() - {"folds", "intervals"}


def test_intervals_draw_an_image_with_its_own_caption(monkeypatch):
    """The further positives of a protocol make no further clusters."""
    rng = np.random.default_rng(2)
    dataset = make_dataset(np.stack([np.arange(12) // 2, np.arange(12)], axis=1))
    images, captions = torch.from_numpy(rng.normal(size=(6, 2))), torch.from_numpy(rng.normal(size=(12, 2)))
    positives = np.array([[0, 1], [3, 1], [2, 4], [5, 7], [0, 7], [4, 11], [1, 3]])  # 1 is a caption of image 0, ...
    monkeypatch.setattr(module, "read_positives", lambda *args: {"i2t": positives, "t2i": positives})
    found = score_protocols(["eccv"], images, captions, dataset)["eccv"]
    best = (images @ captions.T).argmax(dim=0)
    right = {t: 100.0 * any(best[t] == i for i, other in positives if other == t) for t in positives[:, 1]}
    clusters = np.unique([*positives[:, 0], *(t // 2 for t in right)])
    expected = []
    sampler = np.random.default_rng(0)
    for _ in range(1000):
        drawn = clusters[sampler.integers(len(clusters), size=len(clusters))].tolist()
        values = [right[t] for t in right for _ in range(drawn.count(t // 2))]
        expected.append(np.mean(values) if values else np.nan)
    assert found["intervals"]["t2i"]["R@1"] == pytest.approx(np.nanquantile(expected, [0.025, 0.975]))
    assert found["intervals"]["i2t"].keys() == found["i2t"].keys() >= {"R@10", "MedR", "R-P", "mAP@R"}


def test_auto_is_for_the_test_split_of_coco(coco, caplog):
    dataset, _ = coco
    assert choose_protocols(["auto"], dataset) == ["coco_1k", "eccv", "cxc"]
    assert choose_protocols(["map_at_r", "auto"], dataset) == ["map_at_r", "coco_1k", "eccv", "cxc"]
    assert choose_protocols(["none"], dataset) == []
    assert choose_protocols(["auto"], make_dataset(dataset.pairs, name="flickr30k")) == []
    assert choose_protocols(["auto"], make_dataset(dataset.pairs, split="val")) == []
    with caplog.at_level("INFO"):
        assert choose_protocols(["auto"], make_dataset(dataset.pairs)) == ["coco_1k"]
    assert "left out: --protocols eccv" in caplog.text


def test_each_direction_has_the_positives_of_its_queries(coco):
    dataset, metrics = coco
    pairs = read_positives("eccv", dataset)
    for direction, column in (("i2t", 0), ("t2i", 1)):
        ids = (dataset.image_ids, dataset.text_ids)
        listed = [pair for pair in pairs[direction].tolist() if -1 not in pair]
        found = {(ids[column][pair[column]], ids[1 - column][pair[1 - column]]) for pair in listed}
        expected = {(query, item) for query, items in metrics.eccv_gts[direction].items() for item in items}
        missing = expected - found
        assert found <= expected and {item for _, item in missing} == (
            {144675, 467259} if direction == "i2t" else set()
        )


def test_protocols_of_other_data_are_refused(coco, monkeypatch):
    small = make_dataset(np.array([[0, 0], [1, 1]]), image_ids=[1, 2], text_ids=[3, 4])
    for name, words in (("eccv", "lacks images"), ("cxc", "2 images"), ("coco_1k", "2 images")):
        with pytest.raises(UserError, match=f"--protocols {name}") as error:
            check_protocols([name], small)
        assert words in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install eccv-caption"):
        check_protocols(["cxc"], coco[0])


def test_option_chooses_the_protocols(run, arguments, tmp_path):
    code, out, err = run("--eval", *arguments, "--protocols", "map_at_r", "--experiments", "e")
    assert code == 0, err
    block = json.loads((tmp_path / "logs/e/results.json").read_text())["protocols"]["map_at_r"]
    assert set(block["t2i"]) == {"R-P", "mAP@R"} and "map_at_r" in out
    low, high = block["intervals"]["t2i"]["mAP@R"]
    assert low <= block["t2i"]["mAP@R"] <= high and set(block["intervals"]["i2t"]) == {"R-P", "mAP@R"}
    assert block["t2i"]["R-P"] == block["t2i"]["mAP@R"]  # one image each
    code, _, err = run("--eval", *arguments, "--protocols", "eccv")
    assert code == 2 and "--protocols eccv" in err and err.count("\n") == 1
    code, _, err = run(*arguments, "--protocols", "none", "coco_1k")
    assert code == 2 and "--protocols coco_1k" in err and not (tmp_path / "logs/ex0").exists()
