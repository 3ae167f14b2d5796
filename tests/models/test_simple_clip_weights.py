import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from clip_retrieval.errors import UserError
from clip_retrieval.models import simple_clip_weights
from clip_retrieval.models.build import build_model, known_tags, rebuild_model
from clip_retrieval.models.source import find_source
from clip_retrieval.models.tokenizers import build_tokenizer, keep_vocabulary
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import ModelOptions
from tests.models.small import WORDS, small_simple_clip, small_simple_config
from tests.models.test_build import as_checkpoint

PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[2, 5, 7, 6, 3], [2, 9, 10, 6, 3]])


class SqueezeLast(nn.Module):
    def forward(self, x):
        return x.squeeze(-1).squeeze(-1)


class TextEncoder(nn.Module):
    def __init__(self, width):
        super().__init__()
        sizes = {"dim": width, "hidden_dim": 48, "n_layers": 2, "n_heads": width // 64, "max_position_embeddings": 32}
        self.model = DistilBertModel(DistilBertConfig(vocab_size=len(WORDS), **sizes))

    def forward(self, ids):
        return self.model(ids, torch.ones_like(ids)).last_hidden_state.mean(1)


class Reference(nn.Module):
    """simple-clip's own model: a sequence of the trunk's children, and parameters named t_prime and b."""

    def __init__(self, name="resnet18", bias=0.0, width=128):
        super().__init__()
        trunk = [*list(getattr(models, name)(weights=None).children())[:-1], nn.AdaptiveAvgPool2d(1), SqueezeLast()]
        self.image_encoder = nn.Sequential(*trunk)
        self.text_encoder = TextEncoder(width)
        with torch.no_grad():
            image_width = self.image_encoder.eval()(PIXELS).shape[1]
        for tower, size in (("image", image_width), ("text", width)):
            layers = nn.Linear(size, size, bias=False), nn.ReLU(), nn.Linear(size, 24, bias=False)
            setattr(self, f"{tower}_projection", nn.Sequential(*layers))
        self.t_prime = nn.Parameter(torch.tensor(1.7))
        self.b = nn.Parameter(torch.tensor(bias))
        self.eval()

    @torch.no_grad()
    def features(self):
        """Encode PIXELS and IDS."""
        return self.image_projection(self.image_encoder(PIXELS)), self.text_projection(self.text_encoder(IDS))


@torch.no_grad()
def features(clip):
    return clip.encode_image(PIXELS), clip.encode_text(IDS)


@pytest.fixture
def reference(tmp_path):
    """reference(**how): a model of simple-clip, and the path of its clip_model.pth."""

    def make(**how):
        model = Reference(**how)
        with torch.no_grad():  # statistics that differ from those of a new model
            model.train().image_encoder(PIXELS)
        torch.save(model.eval().state_dict(), tmp_path / "clip_model.pth")
        return model, str(tmp_path / "clip_model.pth")

    return make


@pytest.fixture
def config_file(tmp_path):
    """A small model config for --vision_model."""
    path = tmp_path / "simple.json"
    path.write_text(json.dumps({"model_cfg": small_simple_config(), "preprocess_cfg": {"mean": [0.4, 0.5, 0.6]}}))
    return str(path)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_v2_s"])
def test_simple_clip_checkpoint_gives_its_model_and_features(reference, name):
    model, path = reference(name=name)
    built = build_model(ModelOptions(pretrained=path))
    for ours, theirs in zip(features(built.clip), model.features(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (built.name, built.weights) == (name, path)
    hf_config = built.config["text_cfg"]["hf_config"]
    assert (hf_config["dim"], hf_config["n_heads"], hf_config["n_layers"], hf_config["hidden_dim"]) == (128, 2, 2, 48)
    assert built.config["text_cfg"]["context_length"] == 32  # its positions; 100 if it has more
    assert (built.clip.logit_scale.item(), built.clip.logit_bias) == (pytest.approx(1.7), None)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_checkpoint_of_its_first_layout_has_a_head_for_images_only(reference, tmp_path, scale):
    """Until 2024, captions had no projection head, and the temperature may be missing."""
    model, path = reference(width=128)
    model.image_projection[2] = nn.Linear(512, 128, bias=False)
    model.text_projection = nn.Identity()
    state = {name.replace("image_projection", "projection_head"): v for name, v in model.state_dict().items()}
    temperature = {} if scale is None else {"t_prime": torch.tensor([scale]), "b": torch.zeros(1)}
    state = {name: v for name, v in state.items() if name not in ("t_prime", "b")} | temperature
    torch.save(state, path)
    built = build_model(ModelOptions(pretrained=path))
    for ours, theirs in zip(features(built.clip), model.features(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (built.clip.logit_scale.item(), built.clip.logit_bias) == (pytest.approx(scale or 0), None)
    config, preprocess = json.loads(json.dumps([built.config, built.preprocess]))
    again = rebuild_model(config, preprocess, built.clip.state_dict(), built.name, "last.pt")
    assert torch.equal(features(again.clip)[1], features(built.clip)[1])


def test_images_are_squashed_and_only_scaled(reference):
    _, path = reference()
    built = build_model(ModelOptions(pretrained=path, image_size=32, context_length=16))
    expected = {"mean": [0, 0, 0], "std": [1, 1, 1], "resize_mode": "squash", "interpolation": "bilinear", "size": 32}
    assert built.preprocess.items() >= expected.items()
    images = (PIXELS * 255).round().to(torch.uint8)
    with torch.no_grad():
        features = RetrievalModel(built.clip, built.preprocess).eval().encode_image(images)
        plain = built.clip.encode_image(images / 255, normalize=True)
    torch.testing.assert_close(features, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias, kept", [(0.0, None), (0.02, None), (-0.3, None), (-9.5, -9.5)])
def test_only_a_bias_that_siglip_trained_is_kept(reference, bias, kept):
    _, path = reference(bias=bias)
    built = build_model(ModelOptions(pretrained=path))
    assert (built.clip.logit_bias is None) if kept is None else (built.clip.logit_bias.item() == kept)
    # SigLIP training replaces a scale and bias from InfoNCE by SigLIP's initial values.
    built = build_model(ModelOptions(pretrained=path), logit_bias=True)
    scale = torch.tensor(10.0).log().item() if kept is None else 1.7
    assert (built.clip.logit_bias.item(), built.clip.logit_scale.item()) == (
        kept or -10,
        pytest.approx(scale),
    )


def test_wrapped_checkpoint_is_recognised(reference, tmp_path):
    model, path = reference()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model_state_dict": state}, path)
    torch.testing.assert_close(features(build_model(ModelOptions(pretrained=path)).clip), model.features())


def test_names_that_contradict_the_checkpoint_are_refused(reference, config_file):
    _, path = reference()
    text = "distilbert-base-uncased"
    build_model(ModelOptions(vision_model="resnet18", text_model=text, pretrained=path), typed_model=True)
    for name in ("resnet50", config_file, "ViT-B/32"):
        with pytest.raises(UserError, match=rf"--vision_model {name} contradicts .*clip_model.pth, which .* resnet18"):
            build_model(ModelOptions(vision_model=name, pretrained=path), typed_model=True)
    with pytest.raises(UserError, match=r"--text_model RBT3-chinese contradicts .*clip_model.pth"):
        build_model(ModelOptions(pretrained=path, text_model="RBT3-chinese"))
    with pytest.raises(UserError, match=r"clip_model.pth has the weights of its text tower"):
        build_model(ModelOptions(pretrained=path, text_pretrained="bert"))


@pytest.mark.parametrize(
    "lost, words",
    [
        ("image_encoder.5.", "it has no resnet18, resnet50, efficientnet_v2_s"),
        ("text_encoder.model.embeddings.word", "text.transformer.embeddings.word_embeddings.weight is missing"),
        ("image_projection", "visual.head.2.weight is missing"),
        ("text_encoder.model.transformer.layer.1.ffn", "does not fit resnet18: 4 missing"),
        ("t_prime", "does not fit resnet18: 1 missing"),
    ],
)
def test_damaged_checkpoint_is_refused(reference, lost, words):
    model, path = reference()
    torch.save({name: v for name, v in model.state_dict().items() if not name.startswith(lost)}, path)
    with pytest.raises(UserError, match=rf"^[^\n]*clip_model.pth[^\n]*{words}[^\n]*$"):
        build_model(ModelOptions(pretrained=path))


@pytest.mark.parametrize("typed", ["resnet18", "resnet50", "efficientnet", "efficientnet_v2_s"])
def test_simple_clip_names_build_its_models(typed):
    with torch.device("meta"):
        built = build_model(ModelOptions(vision_model=typed, text_model="distilbert-base-uncased"))
    state = built.clip.state_dict()
    assert built.name == ("efficientnet_v2_s" if typed == "efficientnet" else typed)
    assert simple_clip_weights.infer(state, "x.pth") == (built.name, built.config)
    heads = {"resnet18": 512, "resnet50": 2048}.get(built.name, 1280), 768
    assert tuple(len(state[f"{tower}.0.weight"]) for tower in ("visual.head", "text.proj")) == heads
    assert (built.weights, built.clip.logit_bias, built.config["text_cfg"]["context_length"]) == ("none", None, 100)
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "resize_mode": "shortest", "size": 224}
    assert built.preprocess.items() >= imagenet.items()


def test_text_tower_is_distilbert_base_uncased():
    with torch.device("meta"):
        built = build_model(ModelOptions(vision_model="resnet18", context_length=512, image_size=50))
        reference = DistilBertModel(DistilBertConfig())
    assert built.config["text_cfg"]["context_length"] == 512 and built.preprocess["size"] == 50
    shapes = {name: value.shape for name, value in reference.state_dict().items()}
    assert {name: value.shape for name, value in built.clip.text.transformer.state_dict().items()} == shapes
    with pytest.raises(UserError, match="--context_length 513: must be at most 512 for resnet18"):
        build_model(ModelOptions(vision_model="resnet18", context_length=513))


def test_text_tower_of_another_family_is_refused():
    with pytest.raises(
        UserError, match=r"distilbert-base-uncased goes with --vision_model resnet18.* not with ViT-B/32"
    ):
        build_model(ModelOptions(text_model="distilbert-base-uncased"))
    with pytest.raises(UserError, match=r"RBT3-chinese goes with .* not with resnet18"):
        build_model(ModelOptions(vision_model="resnet18", text_model="RBT3-chinese"))
    with pytest.raises(UserError, match=r"distilbert-base: no such text tower; choose from .*distilbert-base-uncased"):
        build_model(ModelOptions(vision_model="resnet18", text_model="distilbert-base"))


@pytest.mark.parametrize(
    "text, words",
    [
        ({"hf_config": {"model_type": "distilbert", "dim": "wide"}}, "field 'dim'"),
        ({"hf_config": {"model_type": "distilbert", "dim": 30, "n_heads": 4}}, "must divide"),
        ({"hf_config": {"model_type": "bert"}}, "model_type distilbert"),
    ],
)
def test_config_that_cannot_be_built_is_refused_in_one_line(tmp_path, text, words):
    config = small_simple_config()
    config["text_cfg"] |= text
    (tmp_path / "broken.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"^[^\n]*broken.json[^\n]*{words}[^\n]*$"):
        build_model(ModelOptions(vision_model=str(tmp_path / "broken.json")))


def torchvision_file(folder, name="resnet18"):
    """Save a torchvision classifier with its own batch statistics, without their counts (as old versions did)."""
    trunk = getattr(models, name)(weights=None).train()
    with torch.no_grad():
        trunk(PIXELS)
    state = {key: v for key, v in trunk.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, folder / f"{name}-f37072fd.pth")
    return state, str(folder / f"{name}-f37072fd.pth")


def text_weights(folder, kind):
    """Save DistilBERT as Hugging Face does, or as on the hub: with a prefix and a pretraining head."""
    hf_config = small_simple_config()["text_cfg"]["hf_config"]
    bert = DistilBertModel(DistilBertConfig(**{k: v for k, v in hf_config.items() if k != "model_type"}))
    state = bert.state_dict()
    if kind == "saved folder":
        bert.save_pretrained(folder / "bert")
    else:
        (folder / "bert").mkdir()
        hub = {f"distilbert.{key}": v for key, v in state.items()} | {"vocab_projector.bias": torch.zeros(5)}
        if kind == "safetensors":
            save_file(hub, folder / "bert" / "model.safetensors")
        else:
            torch.save(hub, folder / "bert" / "pytorch_model.bin")
    place = folder / "bert"
    return state, str(place / "pytorch_model.bin" if kind == "file" else place)


def assert_holds(module, state):
    own = module.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items() if key in own)
    assert sum(key in own for key in state) > 30


@pytest.mark.parametrize("kind", ["saved folder", "hub folder", "safetensors", "file"])
def test_each_tower_starts_from_weights_of_its_own(config_file, tmp_path, kind):
    trunk, image_place = torchvision_file(tmp_path)
    text, text_place = text_weights(tmp_path, kind)
    built = build_model(ModelOptions(vision_model=config_file, pretrained=image_place, text_pretrained=text_place))
    assert_holds(built.clip.visual.trunk, trunk)
    assert_holds(built.clip.text.transformer, text)
    assert built.weights == f"{image_place} for images, {text_place} for captions"
    assert built.preprocess["mean"] == [0.4, 0.5, 0.6]
    assert built.clip.logit_scale.item() == pytest.approx(torch.tensor(1 / 0.07).log().item())
    assert built.random == ("visual.head", "text.proj")


def test_tower_without_weights_stays_random_and_is_reported(config_file, tmp_path):
    trunk, image_place = torchvision_file(tmp_path)
    text, text_place = text_weights(tmp_path, "saved folder")
    only_image = build_model(ModelOptions(vision_model=config_file, pretrained=image_place))
    assert_holds(only_image.clip.visual.trunk, trunk)
    assert only_image.weights == f"{image_place} for images, none for captions"
    assert only_image.random == ("visual.head", "text")
    only_text = build_model(ModelOptions(vision_model=config_file, text_pretrained=text_place))
    assert_holds(only_text.clip.text.transformer, text)
    assert only_text.weights == f"none for images, {text_place} for captions"
    assert only_text.random == ("visual", "text.proj")
    neither = build_model(ModelOptions(vision_model=config_file, pretrained="none", text_pretrained="none"))
    assert neither.weights == "none"


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_v2_s"])
def test_other_torchvision_classifiers_fit(tmp_path, name):
    trunk, path = torchvision_file(tmp_path, name)
    config = small_simple_config()
    config["vision_cfg"]["torchvision_model_name"] = name
    (tmp_path / "other.json").write_text(json.dumps(config))
    built = build_model(ModelOptions(vision_model=str(tmp_path / "other.json"), pretrained=path))
    assert_holds(built.clip.visual.trunk, trunk)


def test_weights_of_other_models_are_refused_for_the_towers(config_file, tmp_path):
    _, path = torchvision_file(tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=13, **sizes)).save_pretrained(tmp_path / "bert")
    torch.save({"transformer.a": torch.zeros(2)}, tmp_path / "clip.pt")
    for options, words in (
        ({"pretrained": path, "vision_model": "resnet50"}, "resnet18-f37072fd.pth.* does not fit resnet50"),
        ({"pretrained": str(tmp_path / "clip.pt")}, "clip.pt holds no image tower .*torchvision's"),
        ({"text_pretrained": str(tmp_path / "bert")}, "model.safetensors holds no DistilBERT"),
        ({"text_pretrained": str(tmp_path)}, "give the folder of a DistilBERT"),
    ):
        with pytest.raises(UserError, match=words):
            build_model(ModelOptions(**{"vision_model": config_file} | options))


def test_text_tower_with_a_contradicting_config_is_refused(config_file, tmp_path):
    _, place = text_weights(tmp_path, "saved folder")
    settings = json.loads((tmp_path / "bert/config.json").read_text())
    (tmp_path / "bert/config.json").write_text(json.dumps(settings | {"n_heads": 1}))
    with pytest.raises(UserError, match=r"bert/config.json: n_heads is 1, but the text tower's 2"):
        build_model(ModelOptions(vision_model=config_file, text_pretrained=place))
    (tmp_path / "bert/config.json").write_text(json.dumps(settings | {"activation": "relu"}))
    with pytest.raises(UserError, match=r"bert/config.json: activation is relu, but the text tower's gelu"):
        build_model(ModelOptions(vision_model=config_file, text_pretrained=place))


def test_vocabulary_beside_the_text_towers_weights_is_used(config_file, tmp_path, no_network):
    _, place = text_weights(tmp_path, "saved folder")
    (tmp_path / "bert/vocab.txt").write_text("\n".join(WORDS) + "\n")
    options = ModelOptions(vision_model=config_file, text_pretrained=place)
    tokenizer = build_tokenizer(options, build_model(options))
    assert tokenizer.words == WORDS


def test_torchvision_weights_have_tags(tmp_path, monkeypatch):
    trunk, path = torchvision_file(tmp_path)
    asked = {}

    def fetch(*wanted):
        asked["wanted"] = wanted
        return path

    monkeypatch.setattr("clip_retrieval.models.hub.fetch_tag", fetch)
    source = find_source(ModelOptions(vision_model="resnet18", pretrained="IMAGENET1K_V1"), typed_model=True)
    assert torch.equal(source.state["visual.trunk.conv1.weight"], trunk["conv1.weight"])
    assert source.weights == "IMAGENET1K_V1 for images, none for captions"
    name, tag, where = asked["wanted"]
    assert (name, tag) == ("resnet18", "IMAGENET1K_V1") and where["url"].endswith("/resnet18-f37072fd.pth")
    assert known_tags("resnet50") == ["IMAGENET1K_V1", "IMAGENET1K_V2"]
    assert known_tags("efficientnet") == ["IMAGENET1K_V1"]
    with pytest.raises(UserError, match=r"--pretrained IMAGENET1K is neither .*did you mean IMAGENET1K_V1"):
        build_model(ModelOptions(vision_model="resnet18", pretrained="IMAGENET1K"))


def test_without_network_one_line_names_the_missing_file(no_network):
    with pytest.raises(UserError, match=r"IMAGENET1K_V1 weights of resnet18 .*download.pytorch.org.*--pretrained FILE"):
        build_model(ModelOptions(vision_model="resnet18", pretrained="IMAGENET1K_V1"))
    with pytest.raises(UserError, match=r"--text_pretrained distilbert-base-uncased: no such file or folder"):
        build_model(ModelOptions(vision_model="resnet18", text_pretrained="distilbert-base-uncased"))
    with torch.device("meta"):
        built = build_model(ModelOptions(vision_model="resnet18"))
    with pytest.raises(UserError, match=r"tokenizer distilbert-base-uncased could not be .*--tokenizer vocab.txt"):
        build_tokenizer(ModelOptions(), built)


def test_checkpoint_of_ours_rebuilds_the_model_without_a_network(config_file, tmp_path, no_network):
    built = build_model(ModelOptions(vision_model=config_file, image_size=48, context_length=9), logit_bias=True)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = build_tokenizer(ModelOptions(tokenizer=str(tmp_path / "vocab.txt")), built)
    keep_vocabulary(built.config, tokenizer)
    config, preprocess = json.loads(json.dumps([built.config, built.preprocess]))
    again = rebuild_model(config, preprocess, built.clip.state_dict(), built.name, "last.pt")
    for ours, theirs in zip(features(again.clip), features(built.clip), strict=True):
        assert torch.equal(ours, theirs)
    assert (again.config, again.preprocess, again.preprocess["size"]) == (config, preprocess, 48)
    assert (again.clip.logit_bias.item(), again.clip.logit_scale.item()) == (-10, pytest.approx(2.3026, abs=1e-4))
    (tmp_path / "vocab.txt").unlink()
    captions = ["a red dogs thing", "cafés"]
    assert torch.equal(build_tokenizer(ModelOptions(), again)(captions), tokenizer(captions))

    path = as_checkpoint(built, tmp_path / "best.pt", vision_model=config_file)
    from_file = build_model(ModelOptions(pretrained=path))
    assert from_file.name == config_file
    assert torch.equal(features(from_file.clip)[0], features(built.clip)[0])


def test_config_of_other_sizes_contradicts_the_checkpoint(config_file, tmp_path):
    path = as_checkpoint(
        build_model(ModelOptions(vision_model=config_file)), tmp_path / "best.pt", vision_model=config_file
    )
    (tmp_path / "wide.json").write_text(json.dumps(small_simple_config(dim=96)))
    (tmp_path / "words.json").write_text(json.dumps(small_simple_config(vocab=WORDS)))
    with pytest.raises(UserError, match=r"--vision_model .*wide.json contradicts .*best.pt"):
        build_model(ModelOptions(vision_model=str(tmp_path / "wide.json"), pretrained=path), typed_model=True)
    # The words of the tokenizer are no part of the model.
    build_model(ModelOptions(vision_model=str(tmp_path / "words.json"), pretrained=path), typed_model=True)


def test_bare_state_dict_of_ours_is_the_whole_model(config_file, tmp_path):
    torch.save(small_simple_clip(seed=1).state_dict(), tmp_path / "whole.pt")
    built = build_model(ModelOptions(vision_model=config_file, pretrained=str(tmp_path / "whole.pt")))
    for ours, theirs in zip(features(built.clip), features(small_simple_clip(seed=1)), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(UserError, match=r"whole.pt has the weights of its text tower; drop --text_pretrained"):
        build_model(
            ModelOptions(vision_model=config_file, pretrained=str(tmp_path / "whole.pt"), text_pretrained="bert")
        )


def test_text_model_may_be_typed_for_a_checkpoint_without_its_name(config_file, tmp_path):
    options = ModelOptions(vision_model=config_file, text_model="distilbert-base-uncased")
    path = as_checkpoint(build_model(options), tmp_path / "best.pt", vision_model=config_file)
    build_model(ModelOptions(pretrained=path, text_model="distilbert-base-uncased"))
    with pytest.raises(UserError, match="--text_model RBT3-chinese contradicts"):
        build_model(ModelOptions(pretrained=path, text_model="RBT3-chinese"))
