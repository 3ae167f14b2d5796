"""--rerank and --ensemble from end to end."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clip_retrieval.api import load_model, read_dataset
from clip_retrieval.data.images.decode import image_pixels_limit
from clip_retrieval.evaluation.bootstrap import bootstrap_intervals
from clip_retrieval.evaluation.metrics import report, retrieval_metrics
from clip_retrieval.evaluation.ranks import retrieval_ranks
from clip_retrieval.evaluation.rerank import METHODS
from tests.conftest import read_json


@pytest.fixture
def trained(run, arguments, tmp_path):
    assert run(*arguments, "--max_steps", "3")[0] == 0
    return tmp_path / "logs" / "ex0" / "best.pt"


@pytest.fixture
def other(run, arguments, captioned, tmp_path):
    """A checkpoint of another model, with another image size."""
    model = ("--vision_model", captioned / "resnet.json", "--image_size", "64", "--experiments", "other")
    code, _, err = run(*arguments, *model, "--max_steps", "2")
    assert code == 0, err
    return tmp_path / "logs" / "other" / "best.pt"


def encode(path, dataset):
    model = load_model(path, "cpu")
    return model.encode_images(dataset.images), model.encode_texts(dataset.captions)


def test_rerank_chooses_parameters_on_val_and_leaves_recall_alone(run, trained, captioned):
    assert run("--eval", "--resume", trained)[0] == 0
    plain = read_json(trained.parent / "eval_csv_test/results.json")
    code, out, err = run("--eval", "--resume", trained, "--rerank", *METHODS)
    assert code == 0, err
    results = read_json(trained.parent / "eval_csv_test/results.json")
    assert [results[d] for d in ("i2t", "t2i")] == [plain[d] for d in ("i2t", "t2i")] and "rerank" not in plain
    assert max(map(len, out[out.index("re-ranked") : out.index("wrote")].splitlines())) <= 80
    test, val = (read_dataset("csv", captioned, split) for split in ("test", "val"))
    for name, method in METHODS.items():
        block = results["rerank"][name]
        assert block["chosen_on"] == "val" and block["uses"] == method.uses
        if method.needs_bank:
            continue
        # the value has the highest rsum on val, and its metrics on test are those of the block
        images, texts = encode(trained, val)
        augmented = method.transform(images, texts, method.grid)
        sums = [report(*retrieval_ranks(a, b, val.pairs))["rsum"] for a, b in augmented]
        value = method.grid[int(np.argmax(sums))]
        assert block[method.parameter] == value
        ((a, b),) = method.transform(*encode(trained, test), [value])
        ranks = retrieval_ranks(a, b, test.pairs)
        assert block["t2i"] == retrieval_metrics(ranks[1])
        assert block["intervals"] == bootstrap_intervals(*ranks, test.pairs)


def test_qb_norm_reports_text_to_image_with_its_bank(run, trained):
    code, _, err = run("--eval", "--resume", trained, "--rerank", "qb_norm", "--rerank_bank", "5")
    assert code == 0, err
    block = read_json(trained.parent / "eval_csv_test/results.json")["rerank"]["qb_norm"]
    assert block["bank"] == 5 and "t2i" in block and "i2t" not in block and "rsum" not in block
    assert block["intervals"].keys() == {"t2i"} and block["intervals"]["t2i"].keys() == block["t2i"].keys()


def test_val_split_is_scored_with_default_parameters(run, trained):
    code, _, err = run("--eval", "--resume", trained, "--rerank", "csls", "--eval_split", "val")
    assert code == 0, err
    block = read_json(trained.parent / "eval_csv_val/results.json")["rerank"]["csls"]
    assert (block["k"], block["chosen_on"]) == (10, "default")


def test_qb_norm_without_training_captions_is_refused(run, trained, captioned, tmp_path):
    lines = (captioned / "captions.csv").read_text().splitlines()
    (tmp_path / "test.csv").write_text("\n".join([lines[0], *(line for line in lines if line.endswith("test"))]))
    data = ("--annotations", tmp_path / "test.csv", "--image_dir", captioned)
    code, out, err = run("--eval", "--resume", trained, *data, "--rerank", "qb_norm")
    assert code == 2 and "needs training captions" in err
    assert "weights:" not in out and not (trained.parent / "eval_csv_test").exists()  # nothing was encoded


def test_ensemble_of_scores_keeps_each_models_preprocessing(run, trained, other, captioned):
    code, _, err = run("--eval", "--resume", trained, "--ensemble", other)
    assert code == 0, err
    results = read_json(trained.parent / "eval_csv_test_ensemble/results.json")
    test = read_dataset("csv", captioned)
    (a, b), (c, d) = encode(trained, test), encode(other, test)
    images, texts = np.concatenate([a, c], axis=1), np.concatenate([b, d], axis=1)
    assert results["t2i"] == retrieval_metrics(retrieval_ranks(images, texts, test.pairs)[1])
    assert results["ensemble"]["mode"] == "scores"
    assert results["model"] == " + ".join(member["model"] for member in results["ensemble"]["members"])
    assert [member["weights"] for member in results["ensemble"]["members"]] == [str(trained), str(other)]
    assert not (trained.parent / "eval_csv_test").exists()


def test_ensemble_keeps_each_models_caption_prefix(run, arguments, trained, captioned, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # to restore it
    prefix = ("--caption_prefix", "a photo of ", "--experiments", "prefixed")
    assert run(*arguments, *prefix, "--max_steps", "2")[0] == 0
    prefixed, test = tmp_path / "logs" / "prefixed" / "best.pt", read_dataset("csv", captioned)
    models = [load_model(path, "cpu") for path in (trained, prefixed)]
    images = np.concatenate([model.encode_images(test.images) for model in models], axis=1)
    for extra, prefixes in (((), [None, "a photo of "]), (("--caption_prefix", "the "), ["the ", "the "])):
        pixels = ("--max_image_pixels", 1000)
        code, _, err = run("--eval", "--resume", trained, "--ensemble", prefixed, *extra, *pixels)
        assert code == 0, err
        results = read_json(trained.parent / "eval_csv_test_ensemble/results.json")
        assert [member.get("caption_prefix") for member in results["ensemble"]["members"]] == prefixes
        own = [replace(model, caption_prefix=text) for model, text in zip(models, prefixes)]
        texts = np.concatenate([model.encode_texts(test.captions) for model in own], axis=1)
        assert results["t2i"] == retrieval_metrics(retrieval_ranks(images, texts, test.pairs)[1])
        assert image_pixels_limit() == 1000  # not that of the other checkpoint


def test_ensemble_of_a_model_with_itself_changes_nothing(run, trained):
    assert run("--eval", "--resume", trained)[0] == 0
    assert run("--eval", "--resume", trained, "--ensemble", trained, "--ensemble_mode", "features")[0] == 0
    alone, twice = (
        read_json(trained.parent / name / "results.json") for name in ("eval_csv_test", "eval_csv_test_ensemble")
    )
    assert alone["i2t"] == twice["i2t"] and alone["t2i"] == twice["t2i"]


def test_missing_member_of_an_ensemble_is_named(run, trained):
    code, _, err = run("--eval", "--resume", trained, "--ensemble", "nowhere.pt")
    assert code == 2 and "nowhere.pt" in err
