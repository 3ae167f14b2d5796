import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clip_retrieval.data.captions import tokenize
from clip_retrieval.data.pixels.transforms import evaluation_transform
from clip_retrieval.errors import UserError
from clip_retrieval.export.export import export
from clip_retrieval.models import chinese_clip
from clip_retrieval.models.build import build_model, rebuild_model
from clip_retrieval.models.tokenizers import build_tokenizer
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.models.trainable import set_trainable
from clip_retrieval.options import ModelOptions
from tests.models.small import small_preprocess

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "狗", "猫", "跑", "a", '"', "。", "[", "]"]


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "words" / "vocab.txt"
    path.parent.mkdir()
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return path


def bert_weights(width=128, layers=2, vocabulary=13, positions=64):
    """Make BERT's tensors under Chinese-CLIP's names, with the unused pooler."""
    from transformers import BertConfig, BertModel

    heads = width // 64
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        max_position_embeddings=positions,
    )
    return {f"bert.{name}": v for name, v in BertModel(config).state_dict().items()}


def checkpoint(folder, resnet=False, **sizes):
    """Save a Chinese-CLIP checkpoint with random weights."""
    from tests.models.small import RESNET, VIT, small_clip

    tower = {**RESNET, "width": 8} if resnet else {**VIT, "width": 64, "head_width": 64}
    visual = small_clip(vision_cfg=tower).visual.state_dict()
    state = {
        **{f"visual.{name}": v for name, v in visual.items()},
        **bert_weights(**sizes),
        "text_projection": torch.randn(sizes.get("width", 128), 24),
        "logit_scale": torch.tensor(2.6),
    }
    path = folder / "clip_cn.pt"
    half = {f"module.{name}": v.half() if v.is_floating_point() else v for name, v in state.items()}
    torch.save({"epoch": 1, "step": 2, "name": "x", "state_dict": half, "optimizer": {}}, path)
    return path


@pytest.fixture
def tiny():
    """The folder of the checkpoint with the reference's own features."""
    if not (folder := os.environ.get("CLIP_RETRIEVAL_DATA")):
        pytest.skip("CLIP_RETRIEVAL_DATA is not set")
    return Path(folder) / "chinese_clip_tiny"


def test_features_are_those_of_the_reference(tiny):
    options = ModelOptions(pretrained=str(tiny / "clip_cn_tiny.pt"), tokenizer=str(tiny / "vocab.txt"))
    built = build_model(options)
    expected = json.loads((tiny / "expected.json").read_text(encoding="utf-8"))
    captions = [caption for of_image in expected["captions"] for caption in of_image]
    transform, photos = evaluation_transform(built.preprocess), tiny.parent / "flickr8k" / "images"
    model = RetrievalModel(built.clip, built.preprocess).eval()
    with torch.no_grad():
        texts = model.encode_text(tokenize(captions, build_tokenizer(options, built)).ids.long())
        images = model.encode_image(
            torch.stack([transform(Image.open(photos / name).convert("RGB")) for name in expected["images"]])
        )
    np.testing.assert_allclose(texts, np.load(tiny / "text_features.npy"), atol=1e-4)
    np.testing.assert_allclose(images, np.load(tiny / "image_features.npy"), atol=1e-4)


@pytest.mark.parametrize("resnet", [False, True])
def test_config_is_inferred_from_tensor_shapes(resnet, tmp_path):
    built = build_model(ModelOptions(pretrained=str(checkpoint(tmp_path, resnet))))
    text = built.config["text_cfg"]["hf_config"]
    assert (text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"]) == (128, 2, 2)
    assert built.config["quick_gelu"]
    assert built.config["vision_cfg"]["image_size"] == (32 if resnet else 16)
    assert built.preprocess["resize_mode"] == "squash"
    assert built.name == "Chinese-CLIP"


def test_config_rebuilds_the_model_elsewhere(tmp_path, vocabulary):
    options = ModelOptions(pretrained=str(checkpoint(tmp_path)), tokenizer=str(vocabulary))
    built = build_model(options)
    config, preprocess = json.loads(json.dumps([built.config, built.preprocess]))
    again = rebuild_model(config, preprocess, built.clip.state_dict(), "ViT-B/32", "last.pt")
    ids = tokenize(["狗跑。"], build_tokenizer(options, again)).ids.long()
    with torch.no_grad():
        assert torch.equal(again.clip.encode_text(ids), built.clip.encode_text(ids))
    assert again.name == "Chinese-CLIP"
    assert again.config == built.config


def test_tokens_equal_the_reference(tmp_path, vocabulary):
    model = build_model(ModelOptions(pretrained=str(checkpoint(tmp_path)), context_length=6))
    for source in (vocabulary, vocabulary.parent):
        tokenizer = build_tokenizer(ModelOptions(tokenizer=str(source)), model)
        tokens = tokenize(["狗A“猫”", "狗", "猫跑。狗狗狗", "[SEP]", ""], tokenizer)
        assert tokens.ids.tolist() == [
            [2, 5, 8, 9, 6, 3],  # a straight quote in place of the curly one; cut, [SEP] kept
            [2, 5, 3, 0, 0, 0],
            [2, 6, 7, 10, 5, 3],
            [2, 11, 1, 12, 3, 0],  # text, not a special token
            [2, 3, 0, 0, 0, 0],
        ]
        assert tokens.lengths.tolist() == [6, 3, 6, 5, 2]
        assert tokens.cut == 2
        assert torch.equal(tokenizer(["狗A“猫”", "狗"]), tokens.ids[:2].long())


def test_context_length_is_52_and_at_most_the_positions(tmp_path):
    path = str(checkpoint(tmp_path))
    assert build_model(ModelOptions(pretrained=path)).config["text_cfg"]["context_length"] == 52
    with pytest.raises(UserError, match="must be at most 64"):
        build_model(ModelOptions(pretrained=path, context_length=65))


def test_vocabulary_of_another_model_is_refused(tmp_path, vocabulary):
    model = build_model(ModelOptions(pretrained=str(checkpoint(tmp_path, vocabulary=20))))
    with pytest.raises(UserError, match=r"vocab.txt has 13 entries, the text tower 20"):
        build_tokenizer(ModelOptions(tokenizer=str(vocabulary)), model)


@pytest.mark.parametrize("source", ["absent.txt", "empty"])
def test_missing_tokenizer_is_named(source, tmp_path):
    (tmp_path / "empty").mkdir()
    model = build_model(ModelOptions(pretrained=str(checkpoint(tmp_path))))
    with pytest.raises(UserError, match=source):
        build_tokenizer(ModelOptions(tokenizer=str(tmp_path / source)), model)


def test_without_network_the_message_asks_for_a_vocabulary(tmp_path, no_network):
    model = build_model(ModelOptions(pretrained=str(checkpoint(tmp_path))))
    with pytest.raises(UserError, match=r"bert-base-chinese could not be fetched.*--tokenizer vocab.txt"):
        build_tokenizer(ModelOptions(), model)


def test_names_that_contradict_the_checkpoint_are_refused(tmp_path):
    path = str(checkpoint(tmp_path))
    with pytest.raises(UserError, match=r"--text_model RBT3-chinese contradicts .*clip_cn.pt"):
        build_model(ModelOptions(pretrained=path, text_model="RBT3-chinese"))
    with pytest.raises(UserError, match=r"--vision_model ViT-B/16 contradicts .*clip_cn.pt"):
        build_model(ModelOptions(pretrained=path, vision_model="ViT-B-16"), typed_model=True)


def test_incomplete_checkpoint_is_refused(tmp_path):
    torch.save({"state_dict": bert_weights()}, tmp_path / "text_only.pt")
    with pytest.raises(UserError, match=r"text_only.pt is an incomplete Chinese-CLIP checkpoint"):
        build_model(ModelOptions(pretrained=str(tmp_path / "text_only.pt")))


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        *((vision, "RBT3-chinese") for vision in chinese_clip.VISION_MODELS),
        *(("RN50", text) for text in chinese_clip.TEXT_MODELS),
    ],
)
def test_reference_model_names_are_inferred_from_tensors(vision, text):
    with torch.device("meta"):
        built = build_model(ModelOptions(vision_model=vision, text_model=text))
    inferred = chinese_clip.infer_config(built.clip.state_dict(), "clip_cn.pt")
    assert chinese_clip.model_name(inferred) == built.name == f"{vision}@{text}"
    assert inferred["text_cfg"] == built.config["text_cfg"]
    assert inferred["embed_dim"] == built.config["embed_dim"]


@pytest.mark.parametrize("vision", chinese_clip.VISION_MODELS)
@pytest.mark.parametrize("text", chinese_clip.TEXT_MODELS)
def test_reference_model_names_are_known(vision, text):
    config = chinese_clip.reference_config(vision, text)
    assert chinese_clip.model_name(config) == f"{vision}@{text}"
    assert config["text_cfg"]["hf_model_name"] == text
    assert config["vision_cfg"].get("head_width", 64) == (80 if vision == "ViT-H-14" else 64)


def test_unknown_text_tower_is_refused():
    with pytest.raises(UserError, match=r"RBT4.*RBT3-chinese"):
        build_model(ModelOptions(vision_model="ViT-B-16", text_model="RBT4-chinese"))
    with pytest.raises(UserError, match="not with tiny"):
        build_model(ModelOptions(vision_model="tiny", text_model="RBT3-chinese"))


@pytest.fixture
def small_names(monkeypatch):
    """RN50 with a text tower small enough for a test."""
    monkeypatch.setitem(chinese_clip.TEXT_MODELS, "small", {"hidden_size": 128, "num_hidden_layers": 2})
    monkeypatch.setattr(chinese_clip, "VOCABULARY", 13)
    monkeypatch.setattr(chinese_clip, "POSITIONS", 64)
    return {"vision_model": "RN50", "text_model": "small"}


def bert_folder(folder, *, old_names):
    """Save a BERT folder in the current format, or in that of 2019 with its pretraining heads."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    bert = BertModel(BertConfig(vocab_size=13, max_position_embeddings=64, **sizes))
    if not old_names:
        bert.save_pretrained(folder)
    else:
        old = {f"bert.{n.replace('LayerNorm.weight', 'LayerNorm.gamma')}": v for n, v in bert.state_dict().items()}
        old = {n.replace("LayerNorm.bias", "LayerNorm.beta"): v for n, v in old.items()}
        folder.mkdir()
        torch.save(old | {"cls.predictions.bias": torch.zeros(13)}, folder / "pytorch_model.bin")
    return bert


@pytest.mark.parametrize("old_names", [False, True])
def test_starts_from_a_clips_image_tower_and_a_bert(tmp_path, small_names, old_names):
    import open_clip

    clip = open_clip.create_model("RN50")
    torch.save(clip.state_dict(), tmp_path / "RN50.pt")
    bert = bert_folder(tmp_path / "bert", old_names=old_names)
    places = {"pretrained": str(tmp_path / "RN50.pt"), "text_pretrained": str(tmp_path / "bert")}
    built = build_model(ModelOptions(**small_names, **places))
    visual, own = built.clip.visual.state_dict(), bert.state_dict()
    assert all(torch.equal(value, visual[name]) for name, value in clip.visual.state_dict().items())
    text = built.clip.text.transformer.state_dict()
    assert len(text) > 30 and all(torch.equal(value, own[name]) for name, value in text.items())
    assert all(place in built.weights for place in places.values())
    assert built.random == ("text.proj",)

    only_text = build_model(ModelOptions(**small_names, text_pretrained=places["text_pretrained"]))
    assert torch.equal(
        only_text.clip.text.transformer.state_dict()["embeddings.word_embeddings.weight"],
        own["embeddings.word_embeddings.weight"],
    )
    only_vision = build_model(ModelOptions(**small_names, pretrained=places["pretrained"]))
    assert torch.equal(only_vision.clip.visual.conv1.weight, clip.visual.conv1.weight)
    assert "none for captions" in only_vision.weights
    assert (only_text.random, only_vision.random) == (("visual", "text.proj"), ("text",))


def test_wrong_text_weights_are_refused(tmp_path, small_names):
    (tmp_path / "empty").mkdir()
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save({"transformer.a": torch.zeros(2)}, tmp_path / "no_tower.pt")
    for options, words in (
        ({"text_pretrained": str(tmp_path / "empty")}, "pytorch_model.bin"),
        ({"text_pretrained": str(tmp_path / "other.pt")}, "holds no BERT"),
        ({"text_pretrained": "nobody/nothing"}, "nobody/nothing: no such file or folder"),
        ({"pretrained": str(tmp_path / "no_tower.pt")}, "holds no image tower"),
    ):
        with pytest.raises(UserError, match=words):
            build_model(ModelOptions(**small_names, **options))
    with pytest.raises(UserError, match="needs --text_model"):
        build_model(ModelOptions(vision_model="RN50", text_pretrained="bert"))
    with pytest.raises(UserError, match="drop --text_pretrained"):
        build_model(ModelOptions(pretrained=str(checkpoint(tmp_path)), text_model="x", text_pretrained="bert"))


def test_export_equals_the_reference_checkpoint(tmp_path, vocabulary):
    path = checkpoint(tmp_path)
    built = build_model(ModelOptions(pretrained=str(path)))
    ours = {"model": built.clip.state_dict(), "model_config": built.config, "preprocess": built.preprocess}
    torch.save(ours | {"options": {"vision_model": built.name}, "epoch": 3, "step": 9}, tmp_path / "ours.pt")
    words = {"tokenizer": str(vocabulary)}
    assert export(tmp_path / "ours.pt", tmp_path / "exported.pt", "chinese_clip", **words) < 1e-5
    exported, reference = (torch.load(p, weights_only=True)["state_dict"] for p in (tmp_path / "exported.pt", path))
    assert exported.keys() == {name for name in reference if ".pooler." not in name}
    assert all(torch.equal(value, reference[name].float()) for name, value in exported.items())
    with pytest.raises(UserError, match=r"exported.pt already exists"):
        export(tmp_path / "ours.pt", tmp_path / "exported.pt", "chinese_clip", **words)
    with pytest.raises(UserError, match="is not a checkpoint of this tool"):
        export(path, tmp_path / "again.pt", "chinese_clip")


@pytest.mark.parametrize("freeze_text", [False, True])
def test_bert_can_be_frozen(tmp_path, freeze_text):
    model = RetrievalModel(build_model(ModelOptions(pretrained=str(checkpoint(tmp_path)))).clip, small_preprocess())
    set_trainable(model, freeze_text=freeze_text)
    model.train()
    ids = torch.tensor([[2, 5, 7, 3, 0], [2, 6, 3, 0, 0]])
    assert model.encode_text(ids).requires_grad == (not freeze_text)
    assert model.clip.text.transformer.training == (not freeze_text)
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    image, text = model(images, ids)
    (image * text).sum().backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any(name.startswith("clip.text.") for name in learned) == (not freeze_text)
    # every trainable parameter has a gradient: distributed training waits for all of them
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learned | {"clip.logit_scale"}
