"""Models that transformers or sentence-transformers saved, compared with transformers itself."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from transformers import (
    AutoTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from clip_retrieval.data.captions import tokenize
from clip_retrieval.data.pixels.transforms import evaluation_transform
from clip_retrieval.errors import UserError
from clip_retrieval.models.build import build_model, rebuild_model
from clip_retrieval.models.tokenizers import build_tokenizer
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import ModelOptions

WORDS = [
    "a",
    "the",
    "thing",
    "red",
    "green",
    "blue",
    "dark",
    "light",
    "circle",
    "square",
    "small",
    "large",
    "round",
    "on",
]
CAPTIONS = ["a red circle", "the large dark blue square on the round light thing and the small circle", "zebra"]
TOWER = {"intermediate_size": 70, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"hidden_size": 48, "max_position_embeddings": 12, "vocab_size": 49408, **TOWER}
VISION = {"hidden_size": 64, "image_size": 32, "patch_size": 8, **TOWER}
SMALL_TEXT = TEXT | {"hidden_size": 64, "vocab_size": 90}


def randomize(model):
    """Make every weight random, so that a weight in the wrong place shows."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        shift = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        if parameter.ndim or "logit" in name:
            torch.nn.init.normal_(parameter, mean=shift, std=0.2)
    return model.eval()


def clip(text=None, vision=None, **fields):
    text, vision = TEXT | (text or {}), VISION | (vision or {})
    return randomize(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=40, **fields)))


def siglip(text=None, vision=None):
    return randomize(
        SiglipModel(SiglipConfig(text_config=SMALL_TEXT | (text or {}), vision_config=VISION | (vision or {})))
    )


def siglip2(image_size=32):
    vision = {name: value for name, value in VISION.items() if name != "image_size"} | {"num_patches": 16}
    if image_size:
        vision["image_size"] = image_size
    return randomize(Siglip2Model(Siglip2Config(text_config=SMALL_TEXT, vision_config=vision)))


def chinese_clip(act="quick_gelu"):
    vision = VISION | {"hidden_act": act}
    config = ChineseCLIPConfig(text_config=SMALL_TEXT, vision_config=vision, projection_dim=40)
    return randomize(ChineseCLIPModel(config))


MODELS = {
    "clip": clip,
    "clip with gelu and the old end token": lambda: clip(
        {"hidden_act": "gelu", "eos_token_id": 2, "vocab_size": 90}, {"hidden_act": "gelu"}
    ),
    "clip with an end token in the vocabulary": lambda: clip({"eos_token_id": 50, "vocab_size": 90}),
    "clip with other norms and a tanh": lambda: clip(
        {"layer_norm_eps": 0.02, "hidden_act": "gelu_new"}, {"layer_norm_eps": 0.01, "hidden_act": "gelu"}
    ),
    "siglip": siglip,
    "siglip with other norms and activations": lambda: siglip(
        {"layer_norm_eps": 0.02, "hidden_act": "quick_gelu"}, {"layer_norm_eps": 0.01, "hidden_act": "gelu"}
    ),
    "siglip with an uneven image": lambda: siglip(None, {"image_size": 30}),
    "siglip2": siglip2,
    "chinese_clip": chinese_clip,
    "chinese_clip with gelu": lambda: chinese_clip("gelu"),
}


def build(**options):
    built = build_model(ModelOptions(**options), typed_model="vision_model" in options)
    return built, RetrievalModel(built.clip, built.preprocess).eval()


def assert_same_features(model, ours):
    """Compare features of random images and ids with those of transformers."""
    text, vision = model.config.text_config, model.config.vision_config
    size = ours.preprocess["size"]
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    ids = torch.randint(5, text.vocab_size - 1, (5, text.max_position_embeddings))
    end = text.vocab_size - 1 if text.eos_token_id in (None, 2) else min(text.eos_token_id, text.vocab_size - 1)
    ids[ids == end] = 5
    ids[torch.arange(5), torch.tensor([3, 6, 9, 10, 11])] = end
    pixels = {"pixel_values": (images / 255 - ours.mean) / ours.std}
    if model.config.model_type == "siglip2":
        side = vision.patch_size
        patches = pixels["pixel_values"].unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 4, 5, 1)
        pixels = {"pixel_values": patches.reshape(3, -1, side * side * 3)}
        rows = size // side
        pixels |= {"pixel_attention_mask": torch.ones(3, rows**2), "spatial_shapes": torch.tensor([[rows, rows]] * 3)}
    with torch.no_grad():
        expected = model.get_image_features(**pixels).pooler_output, model.get_text_features(ids).pooler_output
        for reference, feature in zip(expected, (ours.encode_image(images), ours.encode_text(ids)), strict=True):
            assert reference.std(0).min() > 0.01
            torch.testing.assert_close(feature, F.normalize(reference, dim=-1), atol=1e-5, rtol=0)
    for name in ("logit_scale", "logit_bias"):
        if hasattr(model, name):
            assert getattr(ours.clip, name).item() == getattr(model, name).item()


@pytest.mark.parametrize("kind", MODELS)
def test_features_equal_transformers(kind, tmp_path):
    model = MODELS[kind]()
    model.save_pretrained(tmp_path)
    built, ours = build(vision_model=f"local-dir:{tmp_path}")
    assert_same_features(model, ours)
    assert built.weights == "own"


def save_hub(model, root, monkeypatch, place=""):
    """Save a model in the hub's cache and return the repository's name."""
    commit = "0" * 40
    repository = root / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    model.save_pretrained(repository / "snapshots" / commit / place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    return "hf-hub:some/model"


def save_layout(layout, model, folder, monkeypatch):
    """Save a model in one layout; return the options that name it."""
    if layout == "hub":
        return {"vision_model": save_hub(model, folder, monkeypatch)}
    if layout == "hub of sentence-transformers":
        return {"vision_model": save_hub(model, folder, monkeypatch, "0_CLIPModel")}
    model.save_pretrained(folder, **({"max_shard_size": "20KB"} if "shards" in layout else {}))
    if layout == "folder of sentence-transformers":
        inner = folder / "0_CLIPModel"
        inner.mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / name).rename(inner / name)
        modules = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]
        (folder / "modules.json").write_text(json.dumps(modules))
    elif layout == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    elif layout == "old bins":
        (folder / "model.safetensors").unlink()
        buffer = {"text_model.embeddings.position_ids": torch.arange(12)[None]}
        names, shards = sorted(model.state_dict()), ("pytorch_model-1.bin", "pytorch_model-2.bin")
        for file, part in zip(shards, (names[:20], names[20:]), strict=True):
            torch.save({name: model.state_dict()[name] for name in part} | buffer, folder / file)
        index = {"weight_map": {name: shards[number >= 20] for number, name in enumerate(names)}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        config = json.loads((folder / "config.json").read_text())
        config["text_config_dict"] = config.pop("text_config")
        (folder / "config.json").write_text(json.dumps(config | {"text_config": {}}))
    elif layout == "file":
        return {"pretrained": str(folder / "model.safetensors")}
    elif layout == "index of shards":
        return {"pretrained": str(folder / "model.safetensors.index.json")}
    return {"pretrained": str(folder)} if layout == "pretrained" else {"vision_model": f"local-dir:{folder}"}


LAYOUTS = ["pretrained", "file", "shards", "index of shards", "bin", "old bins", "folder of sentence-transformers"]


@pytest.mark.parametrize("layout", [*LAYOUTS, "hub", "hub of sentence-transformers"])
def test_every_layout_gives_the_same_features(layout, tmp_path, no_network, monkeypatch):
    model = clip()
    options = save_layout(layout, model, tmp_path, monkeypatch)
    assert_same_features(model, build(**options)[1])


def test_typed_model_must_agree_with_the_folder(tmp_path):
    clip().save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(UserError, match=r"--vision_model tiny contradicts .*; drop --vision_model"):
            build(vision_model="tiny", pretrained=str(place))


def test_file_without_a_config_needs_the_models_name(tmp_path):
    config = {
        "embed_dim": 40,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "mlp_ratio": 1.1},
        "text_cfg": {"context_length": 12, "width": 48, "heads": 4, "layers": 2, "mlp_ratio": 1.46},
    }
    (tmp_path / "small.json").write_text(json.dumps(config))
    model = clip()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    file = str(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no config.json beside it; put it there, or give the model as --vision_model"):
        build(pretrained=file)
    assert_same_features(model, build(vision_model=str(tmp_path / "small.json"), pretrained=file)[1])


REFUSED = [
    (lambda: siglip2(None), {}, "NaFlex"),
    (clip, {"model_type": "blip"}, "model_type 'blip' is not supported; the supported ones are clip, siglip"),
    (clip, {"model_type": None}, "model_type None is not supported"),
    (clip, {"vision_config": {"pruned_heads": {"0": [1]}}}, "heads are pruned"),
    (clip, {"vision_config": {"num_channels": 4}}, "4 channels"),
    (clip, {"vision_config": {"image_size": [32, 64]}}, "32 x 64 pixels"),
    (siglip, {"vision_config": {"hidden_act": "relu"}}, "hidden_act is relu"),
    (clip, {"vision_config": {"hidden_act": "gelu"}}, "only one of the towers has the hidden_act quick_gelu"),
    (clip, {"vision_config": {"num_attention_heads": 0}}, "cannot be used"),
    (clip, {"text_config": {"hidden_size": "48"}}, "cannot be used"),
    (clip, {"text_config": {"hidden_size": 52}}, "another shape"),
    (siglip, {"vision_config": {"vision_use_head": False}}, "no pooling head"),
]


@pytest.mark.parametrize(("make", "changes", "words"), REFUSED, ids=[words for _, _, words in REFUSED])
def test_unsupported_config_is_refused_in_one_line(make, changes, words, tmp_path):
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in changes.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words) as error:
        build(vision_model=f"local-dir:{tmp_path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shards", [{}, {"weight_map": {}}, {"weight_map": {"x": "../model.safetensors"}}, []])
def test_damaged_index_of_shards_is_refused(shards, tmp_path):
    clip().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(shards))
    with pytest.raises(UserError, match="is not an index of weight files"):
        build(vision_model=f"local-dir:{tmp_path}")


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no open_clip_config.json and no config.json of a CLIP"):
        build(vision_model=f"local-dir:{tmp_path}")
    with pytest.raises(UserError, match="no such folder"):
        build(vision_model=f"local-dir:{tmp_path / 'absent'}")


@pytest.mark.parametrize(
    ("processor", "size"),
    [
        (CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=2), 32),
        (CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}), 32),
        (CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False, image_mean=[0.1, 0.2, 0.3]), 32),
        (SiglipImageProcessor(size={"height": 32, "width": 32}, image_std=[0.4, 0.5, 0.6]), 32),
    ],
    ids=["bilinear", "larger, then cropped", "squashed", "siglip"],
)
def test_preprocessing_equals_the_folders(processor, size, tmp_path):
    clip().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    built, ours = build(vision_model=f"local-dir:{tmp_path}")
    gradient = np.linspace(0, 255, 50 * 71 * 3).reshape(50, 71, 3).astype(np.uint8)
    image = Image.fromarray(gradient)
    expected = processor(image, return_tensors="pt").pixel_values[0]
    pixels = (evaluation_transform(built.preprocess)(image) / 255 - ours.mean) / ours.std
    assert pixels.shape == (3, size, size)
    assert (pixels - expected).abs().max() < 0.03  # torch's and Pillow's resizing differ by one or two grey levels


def test_size_before_the_crop_follows_the_image_size(tmp_path):
    clip().save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=32).save_pretrained(tmp_path)
    built, _ = build(vision_model=f"local-dir:{tmp_path}", image_size=64)
    assert (built.preprocess["resize_size"], built.preprocess["size"]) == (80, 64)
    assert evaluation_transform(built.preprocess, "fast")(Image.new("RGB", (70, 90))).shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resample": 1}, "resample is 1"),
        ({"do_rescale": False}, "not scaled"),
        ({"size": {"shortest_edge": 24}}, "24"),
    ],
)
def test_unsupported_preprocessing_is_refused(changes, words, tmp_path):
    clip().save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=words):
        build(vision_model=f"local-dir:{tmp_path}")


def save_tokenizer(folder):
    """Save a tokenizer of the words in WORDS, with an end token and padding on the right."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@pytest.mark.parametrize("make", [siglip, lambda: clip({"vocab_size": 90, "eos_token_id": 1})], ids=["siglip", "clip"])
def test_tokens_equal_the_folders_tokenizer(make, tmp_path, no_network):
    make().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    built, _ = build(vision_model=f"local-dir:{tmp_path}")
    reference = AutoTokenizer.from_pretrained(tmp_path)
    expected = reference(CAPTIONS, padding="max_length", truncation=True, max_length=12, return_tensors="pt").input_ids
    assert torch.equal(tokenize(CAPTIONS, build_tokenizer(ModelOptions(), built)).ids.long(), expected)


@pytest.mark.parametrize("files", [{"..": "x"}, {"": "x"}, {"tokenizer.json": "\N{DOG FACE}"}, {"tokenizer.json": "{"}])
def test_invalid_tokenizer_files_of_a_checkpoint_are_refused(files, tmp_path, no_network):
    siglip().save_pretrained(tmp_path)
    built, _ = build(vision_model=f"local-dir:{tmp_path}")
    built.config["text_cfg"]["tokenizer_files"] = files
    with pytest.raises(UserError, match=r"give (another )?--tokenizer"):
        build_tokenizer(ModelOptions(), built)


@pytest.mark.parametrize("has_files", [False, True])
def test_openais_vocabulary_has_openais_tokenizer(has_files, tmp_path, no_network):
    clip().save_pretrained(tmp_path)
    if has_files:
        words = SimpleTokenizer().encoder
        words = {"<|startoftext|>": words.pop("<start_of_text>"), "<|endoftext|>": words.pop("<end_of_text>"), **words}
        CLIPTokenizer(vocab=words, merges=list(SimpleTokenizer().bpe_ranks)).save_pretrained(tmp_path)
        assert AutoTokenizer.from_pretrained(tmp_path)(["a dog"]).input_ids == [[49406, 320, 1929, 49407]]
    built, _ = build(vision_model=f"local-dir:{tmp_path}")
    assert "hf_tokenizer_name" not in built.config["text_cfg"]
    assert build_tokenizer(ModelOptions(), built)(["a dog"])[0, :5].tolist() == [49406, 320, 1929, 49407, 0]


@pytest.mark.parametrize("kind", ["clip", "siglip", "chinese_clip"])
def test_finetune_resumes_and_evaluates_without_the_folder(kind, arguments, run, tmp_path, no_network):
    folder = tmp_path / "model"
    MODELS[kind]().save_pretrained(folder)
    if kind == "chinese_clip":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        (folder / "vocab.txt").write_text("\n".join([*words, *(f"w{n}" for n in range(90 - len(words)))]) + "\n")
    elif kind == "siglip":
        save_tokenizer(folder)
    command = [*arguments, "--vision_model", f"local-dir:{folder}"]
    assert run(*command)[0] == 0
    logs = tmp_path / "logs" / "ex0"
    first = json.loads((logs / "results.json").read_text())

    # the folder has moved
    folder.rename(tmp_path / "moved")
    code, _, errors = run("--eval", "--resume", logs / "best.pt", "--num_workers", "0", "--device", "cpu")
    assert code == 0, errors
    assert json.loads((logs / "eval_csv_test" / "results.json").read_text())["rsum"] == first["rsum"]
    for epochs, typed in (("3", folder), ("4", tmp_path / "moved")):
        resume = ["--vision_model", f"local-dir:{typed}", "--resume", "auto", "--epochs", epochs]
        code, _, errors = run(*command, *resume)
        assert code == 0, errors
    if kind != "chinese_clip":
        assert json.loads((logs / "options.json").read_text())["vision_model"] == f"local-dir:{tmp_path / 'moved'}"


def test_siglip_tower_is_resized_and_rebuilt(tmp_path):
    siglip().save_pretrained(tmp_path)
    built, ours = build(vision_model=f"local-dir:{tmp_path}", image_size=48)
    again = rebuild_model(built.config, built.preprocess, built.clip.state_dict(), built.name, "last.pt")
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    with torch.no_grad():
        features = RetrievalModel(again.clip, again.preprocess).eval().encode_image(images)
        torch.testing.assert_close(features, ours.encode_image(images))
