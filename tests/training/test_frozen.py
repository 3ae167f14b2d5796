"""Cached features of frozen towers give the same weights as running the towers in every epoch."""

import pytest
import torch

from clip_retrieval import encode


@pytest.mark.parametrize("model", ["small.json", "resnet.json"])
@pytest.mark.parametrize(
    "extra",
    [
        ("--trainable", "linear_projection"),
        ("--trainable", "adaptor", "--loss", "margin"),
        ("--freeze_vision",),
        ("--freeze_text", "--grad_cache", "5"),  # equal chunks: batch statistics of two images are ill-conditioned
        ("--trainable", "linear_projection", "--freeze_text", "--loss", "siglip"),
    ],
    ids=" ".join,
)
def test_cached_features_give_the_same_weights(run, arguments, captioned, tmp_path, model, extra):
    command = [*arguments, "--vision_model", captioned / model, "--eps", "1e-3", "--no_eval_first", *extra]
    weights = []
    for name, plain in (("plain", ["--no_feature_cache"]), ("cached", [])):
        code, out, err = run(*command, *plain, "--experiments", name)
        assert code == 0, err
        assert ("encoded once" in out) == (not plain)
        weights.append(torch.load(tmp_path / "logs" / name / "last.pt", weights_only=True)["model"])
    names = weights[0].keys()
    assert names == weights[1].keys()
    for name in names:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-4, atol=1e-6, msg=name)


def test_images_are_read_once(run, arguments, tmp_path, monkeypatch):
    from clip_retrieval.data.batches import loader

    rows_read = []
    normal = loader._FetchPixels.__call__
    monkeypatch.setattr(
        loader._FetchPixels, "__call__", lambda self, request: rows_read.extend(request[0]) or normal(self, request)
    )
    options = ("--freeze_vision", "--no_eval_first", "--eval_every", "0", "--epochs", "5")
    code, _, err = run(*arguments, *options, "--experiments", "cached")
    assert code == 0, err
    evaluated = 6 + 6  # val and test, at the end
    assert len(rows_read) == 14 + evaluated
    rows_read.clear()
    run(*arguments, *options, "--experiments", "plain", "--no_feature_cache")
    assert len(rows_read) >= 5 * 30 + evaluated


def test_random_crops_are_not_cached(run, arguments, monkeypatch):
    encoded = []
    normal = encode.encode_images
    monkeypatch.setattr(
        "clip_retrieval.run.train_parts.encode_images", lambda *a, **k: encoded.append(1) or normal(*a, **k)
    )
    code, _, err = run(*arguments, "--freeze_vision", "--augment", "crop", "--max_steps", "1")
    assert code == 0 and not encoded, err
    code, _, err = run(*arguments, "--freeze_vision", "--max_steps", "1", "--overwrite")
    assert code == 0 and encoded, err


def test_a_broken_image_of_a_hugging_face_data_set_is_left_out(run, arguments, captioned, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    images = [{"bytes": (captioned / f"{number}.jpg").read_bytes(), "path": None} for number in range(14)]
    images[5]["bytes"] = b"broken"
    columns = {"image": images, "caption": [f"thing {number}" for number in range(14)]}
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    place = arguments[arguments.index("--vision_model") :]
    code, out, err = run(
        *("--dataset", "huggingface", "--dataset_root", tmp_path / "saved"),
        *place,
        "--freeze_vision",
        "--max_steps",
        "2",
    )
    assert code == 0, err
    assert "encoded once" in out and "1 of 14 images is left out" in err


def test_a_broken_image_of_a_mixture_is_replaced(run, arguments, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/0.jpg").write_bytes(b"broken")
    (tmp_path / "other/captions.csv").write_text("image,caption,split\n0.jpg,broken thing,train\n")
    both = [*arguments, "--dataset", "csv", "--dataset_root", tmp_path / "other", "--freeze_vision", "--max_steps", "3"]
    code, _, err = run(*both)
    assert code == 2 and "not a readable image" in err
    code, out, err = run(*both, "--skip_broken")
    assert code == 0, err
    assert "encoded once" not in out
