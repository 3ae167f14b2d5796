"""Exports are read by the other systems with the features of the model; nothing else is written."""

import json

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image

from clip_retrieval import load_model
from clip_retrieval.errors import UserError
from clip_retrieval.export.export import CARD, export
from clip_retrieval.export.sample import Exported, Sample, compare
from clip_retrieval.files import read_json

TEXTS = ["a photo of two dogs", "A CAT, at 10 o'clock.", "bird"]


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(1)
    small = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(2)]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(small, ((50, 30), (30, 64)))]


def close(a, b, tolerance=1e-5):
    a, b = (torch.nn.functional.normalize(features.detach(), dim=-1) for features in (a, b))
    return torch.allclose(a, b, atol=tolerance)


@pytest.mark.parametrize(
    "kind", ["clip", "quick_gelu", "bias", "resnet", "wide", "average", "siglip", "roberta", "chinese"]
)
def test_open_clip_loads_the_folder(saved, tmp_path, photos, kind, no_network):
    path, _ = saved(kind)
    assert export(path, tmp_path / "out", "open_clip") < 1e-5
    name = f"local-dir:{tmp_path / 'out'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    ours = load_model(path, "cpu")
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([preprocess(photo) for photo in photos]))
        texts = model.encode_text(tokenizer(TEXTS))
    assert close(images, ours.encode_images(photos)) and close(texts, ours.encode_texts(TEXTS))
    again = load_model(name, "cpu")
    assert close(again.encode_images(photos), images) and close(again.encode_texts(TEXTS), texts)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("clip", "CLIP"),
        ("quick_gelu", "CLIP"),
        ("bias", "CLIP"),
        ("mlp", "CLIP"),
        ("siglip", "Siglip"),
        ("chinese", "ChineseCLIP"),
    ],
)
def test_transformers_loads_the_folder(saved, tmp_path, photos, kind, name, no_network):
    path, clip = saved(kind)
    assert export(path, tmp_path / "out", "transformers") < 1e-5
    model = getattr(transformers, f"{name}Model").from_pretrained(tmp_path / "out").eval()
    processor = getattr(transformers, f"{name}Processor").from_pretrained(tmp_path / "out")
    inputs = processor(images=photos, text=TEXTS, return_tensors="pt", padding="max_length", truncation=True)
    ours = load_model(path, "cpu")
    with torch.no_grad():
        output = model(**inputs)
    assert close(output.text_embeds, ours.encode_texts(TEXTS))
    assert close(output.image_embeds, ours.encode_images(photos), tolerance=0.02)  # it resizes with another library
    assert torch.equal(model.logit_scale.flatten(), clip.logit_scale.flatten())
    getattr(transformers, f"{name}ImageProcessor").from_pretrained(tmp_path / "out")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("kind", ["resnet", "wide", "average", "roberta"])
def test_architecture_without_a_class_in_transformers_is_refused(saved, tmp_path, kind):
    with pytest.raises(UserError, match=r"transformers has no such|this format cannot hold") as error:
        export(saved(kind)[0], tmp_path / "out", "transformers")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_chinese_quotes_are_straightened_in_every_export(saved, tmp_path, no_network):
    path, _ = saved("chinese")
    for format in ("open_clip", "transformers"):
        export(path, tmp_path / format, format)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / format)
        assert tokenizer("“狗”").input_ids == tokenizer('"狗"').input_ids == [2, 9, 5, 9, 3]
        assert tokenizer("a" * 99 + " 狗" * 99, truncation=True).input_ids[-1] == 3


def test_a_folder_tower_is_found_after_the_export(saved, tmp_path, no_network):
    export(saved("roberta")[0], tmp_path / "out", "open_clip")
    text = read_json(tmp_path / "out" / "open_clip_config.json")["model_cfg"]["text_cfg"]
    assert text["hf_model_name"] == str(tmp_path / "out" / "text_tower")
    assert "hf_config" not in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "chinese"])
def test_onnxruntime_computes_the_features(saved, tmp_path, photos, kind, no_network):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path, _ = saved(kind, model={"adaptor.0.weight": torch.randn(6, 24), "adaptor.2.weight": torch.randn(24, 6)})
    assert export(path, tmp_path / "out", "onnx") < 1e-5
    model = load_model(path, "cpu")
    assert model.model.adaptor is not None
    for count in (1, 3):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 3, 16, 16), dtype=np.uint8)
        (images,) = onnxruntime.InferenceSession(tmp_path / "out" / "image.onnx").run(None, {"images": pixels})
        (texts,) = onnxruntime.InferenceSession(tmp_path / "out" / "text.onnx").run(
            None, {"ids": model.tokenizer(TEXTS[:count]).numpy()}
        )
        expected = model.model.encode_image(torch.from_numpy(pixels)).detach()
        assert torch.allclose(torch.from_numpy(images), expected, atol=1e-5)
        assert torch.allclose(torch.from_numpy(texts), model.encode_texts(TEXTS[:count]), atol=1e-5)


def test_missing_onnx_packages_are_named(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx onnxscript onnxruntime"):
        export(saved("clip")[0], tmp_path / "out", "onnx")


def test_adaptor_is_refused(saved, tmp_path):
    path, _ = saved("clip", model={"adaptor.0.weight": torch.ones(6, 24), "adaptor.2.weight": torch.ones(24, 6)})
    for format in ("open_clip", "transformers", "chinese_clip"):
        with pytest.raises(UserError, match="has an adaptor"):
            export(path, tmp_path / "out", format)


@pytest.mark.parametrize("format", ["open_clip", "transformers", "chinese_clip", "onnx"])
def test_existing_output_is_refused(saved, tmp_path, format):
    path, _ = saved("clip")
    for make in (lambda out: out.mkdir(), lambda out: out.write_text(""), lambda out: out.symlink_to("nowhere")):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        make(out)
        with pytest.raises(UserError, match="already exists"):
            export(path, out, format)


def test_model_card_of_a_file_does_not_replace_another_file(saved, tmp_path):
    (tmp_path / "new.md").write_text("notes")
    with pytest.raises(UserError, match=r"new\.md already exists"):
        export(saved("chinese")[0], tmp_path / "new.pt", "chinese_clip")


def test_file_with_the_name_of_the_model_card_is_refused(saved, script, tmp_path):
    path, _ = saved("chinese")
    code, _, err = script("export", path, "clip_cn.md", "--format", "chinese_clip")
    assert code == 2 and err.count("\n") == 1
    assert "clip_cn.md: the model card has this name; choose one that ends in .pt" in err
    assert not (tmp_path / "clip_cn.md").exists()
    code, _, err = script("export", path, "folder.md", "--format", "open_clip")  # a folder may have any name
    assert code == 0 and (tmp_path / "folder.md" / CARD).is_file(), err


def test_wrong_export_is_not_written(saved, tmp_path, monkeypatch):
    path, _ = saved("clip")
    for name, value in (("image_features", torch.ones(3, 24)), ("ids", torch.zeros(4, 16, dtype=torch.int64))):

        def read(folder, sample, name=name, value=value):
            found = {"image_features": sample.image_features, "text_features": sample.text_features}
            return Exported(**found | {name: value})

        monkeypatch.setattr("clip_retrieval.export.open_clip_folder.read", read)
        with pytest.raises(UserError, match="nothing was written"):
            export(path, tmp_path / "out", "open_clip")
        assert sorted(each.name for each in tmp_path.iterdir()) == ["best.pt", "model.json"]


def test_differences_are_measured_on_normalised_features():
    features = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    sample = Sample([], [], *[torch.zeros(1)] * 2, None, features, features)
    assert compare(sample, Exported(7 * features, features), "x") < 1e-6
    for wrong in (features + 1e-3, features[:, :4], features * float("nan")):
        with pytest.raises(UserError, match="text_features differ"):
            compare(sample, Exported(features, wrong), "x")


BLOCK = {"R@1": 12.345, "R@5": 20.0, "R@10": 30.0, "MedR": 4.0, "MeanR": 5.0}
RESULTS = {"split": "val", "i2t": BLOCK, "t2i": BLOCK, "mean_recall": 20.0, "rsum": 120.0}


def test_model_card_has_data_options_and_results(saved, tmp_path):
    options = {"vision_model": "small", "dataset": "coco", "dataset_root": "/home/me/coco", "lr": 3e-5, "epochs": 10}
    path, _ = saved("clip", options=options, val=RESULTS)
    export(path, tmp_path / "out", "open_clip")
    card = (tmp_path / "out" / CARD).read_text()
    assert "| val | image to text | 12.35 | 20.00 | 30.00 | 4.00 |" in card
    assert "| lr | 3e-05 |" in card and "| dataset_root | coco |" in card and "/home" not in card
    assert "| epochs |" not in card and "put it before" not in card  # the default


def test_model_card_names_the_prefix_of_the_captions(saved, tmp_path):
    path, _ = saved("clip", options={"vision_model": "small", "caption_prefix": "a photo of <b> "})
    export(path, tmp_path / "out", "open_clip")
    assert "“a photo of &#60;b&#62; ”: put it before each text" in (tmp_path / "out" / CARD).read_text()


@pytest.mark.parametrize("step, split, is_shown", [(3, "test", True), (2, "test", False), (3, "val", False)])
def test_model_card_has_test_results_of_its_own_step_only(saved, tmp_path, step, split, is_shown):
    path, _ = saved("clip", val=RESULTS)
    block = BLOCK | {"R@1": 77.77}
    results = RESULTS | {"split": split, "i2t": block, "t2i": block, "step": step, "dataset": "coco"}
    (tmp_path / "results.json").write_text(json.dumps(results))
    export(path, tmp_path / "out", "open_clip")
    card = (tmp_path / "out" / CARD).read_text()
    assert ("| coco test | image to text | 77.77 |" in card) == is_shown == ("77.77" in card)
    assert "| val | image to text | 12.35 |" in card

    # results.json is about best.pt, not about another checkpoint of this step
    path.with_name("last.pt").write_bytes(path.read_bytes())
    export(path.with_name("last.pt"), tmp_path / "last", "open_clip")
    assert "77.77" not in (tmp_path / "last" / CARD).read_text()


def test_values_in_the_model_card_are_escaped(saved, tmp_path):
    evil = "a|b\n# <script>[x](y)`*_z_*` \x1b[2J"
    path, _ = saved("clip", options={"vision_model": evil, "annotations": f"/x/{evil}"})
    export(path, tmp_path / "out", "open_clip")
    card = (tmp_path / "out" / CARD).read_text()
    assert "<script>" not in card and "\x1b" not in card and "a|b" not in card and "[x](y)" not in card
    assert "a&#124;b &#35; &#60;script&#62;" in card


@pytest.mark.parametrize("format, out", [("open_clip", "out"), ("chinese_clip", "new.pt")])
def test_the_script_exports(saved, script, tmp_path, format, out):
    path, _ = saved("chinese")
    code, printed, err = script("export", path, out, "--format", format)
    assert code == 0 and f"wrote {out}" in printed, err
    assert (tmp_path / "out" / CARD if format == "open_clip" else tmp_path / "new.md").is_file()
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]
    code, _, err = script("export", path, out, "--format", format)
    assert code == 2 and err.count("\n") == 1 and "already exists" in err


def test_the_script_offers_all_formats(script):
    from clip_retrieval.export.export import FORMATS

    _, out, _ = script("export", "--help")
    assert all(name in out for name in FORMATS)
