import json
import logging
import math
import shutil
import time

import pytest
import torch
from open_clip import CLIP, get_model_config
from open_clip.pretrained import get_pretrained_cfg
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from clip_retrieval.errors import UserError
from clip_retrieval.models.build import build_model, known_tags, rebuild_model
from clip_retrieval.models.source import find_source
from clip_retrieval.models.tokenizers import build_tokenizer
from clip_retrieval.options import ModelOptions, Options
from clip_retrieval.run.model import load_model
from tests.models.small import TEXT, VIT, small_clip, small_config
from tests.models.test_weights import features, jit_archive

# open_clip 4 fetches OpenAI's weights from the hub only
OPENAI_FILE = ["ViT-B-32.pt"] if get_pretrained_cfg("ViT-B-32", "openai").get("url") else []


@pytest.fixture
def config_file(tmp_path):
    """A small model config for --vision_model."""
    path = tmp_path / "small.json"
    path.write_text(json.dumps(small_config()))
    return str(path)


@pytest.fixture
def weight_file(tmp_path):
    """Weights of the small model."""
    torch.save(small_clip(seed=1).state_dict(), tmp_path / "small.pt")
    return str(tmp_path / "small.pt")


def as_checkpoint(built, path, **options):
    """Save a checkpoint of ours."""
    content = {
        "model": built.clip.state_dict(),
        "model_config": built.config,
        "preprocess": built.preprocess,
        "options": {"vision_model": "small"} | options,
        "epoch": 1,
        "step": 1,
    }
    torch.save(content, path)
    return str(path)


def test_tiny_is_built_without_weights():
    built = build_model(ModelOptions(vision_model="tiny"))
    assert (built.name, built.weights, built.adaptor_state) == ("tiny", "none", None)
    assert built.preprocess["size"] == built.config["vision_cfg"]["image_size"]
    assert all(p.dtype == torch.float32 for p in built.clip.parameters())
    assert build_tokenizer(ModelOptions(), built).context_length == built.config["text_cfg"]["context_length"]


def test_file_is_loaded_into_the_named_model(config_file, weight_file):
    built = build_model(ModelOptions(vision_model=config_file, pretrained=weight_file))
    assert torch.allclose(features(built.clip), features(small_clip(seed=1)), atol=1e-6)
    assert (built.name, built.weights) == (config_file, weight_file)


def test_config_and_preprocessing_are_plain_json_and_rebuild_the_model(config_file, weight_file):
    built = build_model(ModelOptions(vision_model=config_file, pretrained=weight_file, image_size=32, context_length=9))
    config, preprocess = json.loads(json.dumps([built.config, built.preprocess]))
    assert (config, preprocess) == (built.config, built.preprocess)
    again = rebuild_model(config, preprocess, built.clip.state_dict(), built.name, "last.pt")
    assert torch.equal(features(again.clip, 32), features(built.clip, 32))
    assert (again.config, again.preprocess, again.preprocess["size"]) == (config, preprocess, 32)
    assert build_tokenizer(ModelOptions(), again).context_length == 9


def test_config_file_may_hold_preprocessing(tmp_path):
    content = {"model_cfg": small_config(), "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "resize_mode": "squash"}}
    (tmp_path / "small.json").write_text(json.dumps(content))
    preprocess = build_model(ModelOptions(vision_model=str(tmp_path / "small.json"))).preprocess
    assert preprocess["mean"] == [0.5, 0.5, 0.5]
    assert preprocess["resize_mode"] == "squash"
    assert preprocess["interpolation"] == "bicubic"


@pytest.mark.parametrize(
    "content",
    [
        '{"embed_dim": 4}',
        '{"embed_dim": 4, "vision_cfg": 1, "text_cfg": 2}',
        "[1]",
        "{",
        '{"embed_dim": 4, "vision_cfg": {"oops": 1}, "text_cfg": {}}',
    ],
)
def test_invalid_config_file_is_refused(content, tmp_path):
    (tmp_path / "broken.json").write_text(content)
    with pytest.raises(UserError, match=r"^[^\n]*broken.json[^\n]*$"):
        build_model(ModelOptions(vision_model=str(tmp_path / "broken.json")))


def activation(built):
    return type(built.clip.visual.transformer.resblocks[0].mlp.gelu).__name__


def test_openai_archive_runs_with_quick_gelu(config_file, tmp_path):
    source = small_clip(seed=1, quick_gelu=True)
    jit_archive(source, tmp_path / "ViT-B-32.pt")
    built = build_model(ModelOptions(vision_model=config_file, pretrained=str(tmp_path / "ViT-B-32.pt")))
    assert activation(built) == "QuickGELU"
    assert torch.allclose(features(built.clip), features(source), atol=1e-6)


def test_config_file_decides_the_activation_of_a_bare_state_dict(config_file, weight_file):
    assert activation(build_model(ModelOptions(vision_model=config_file, pretrained=weight_file))) == "GELU"


@pytest.mark.parametrize(
    ("name", "quick_gelu"), [("ViT-B/32", True), ("RN50", True), ("ViT-B-32", False), ("ViT-B-32-quickgelu", True)]
)
def test_spelling_decides_the_activation_of_a_bare_state_dict(name, quick_gelu, weight_file):
    source = find_source(ModelOptions(vision_model=name, pretrained=weight_file), typed_model=True)
    assert bool(source.config.get("quick_gelu")) == quick_gelu


@pytest.mark.parametrize(
    ("name", "tag", "quick_gelu"),
    [
        ("ViT-B-32", "openai", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-B/32", "laion2b_s34b_b79k", False),
        ("ViT-B/32", "metaclip-400m", True),
        ("roberta-ViT-B-32", "laion2b_s12b_b32k", True),
    ],
)
def test_tag_decides_its_activation(name, tag, quick_gelu, weight_file, monkeypatch):
    monkeypatch.setattr("clip_retrieval.models.hub.fetch_tag", lambda *args: weight_file)
    source = find_source(ModelOptions(vision_model=name, pretrained=tag), typed_model=True)
    assert bool(source.config.get("quick_gelu")) == quick_gelu


def test_tag_decides_the_preprocessing(weight_file, monkeypatch):
    monkeypatch.setattr("clip_retrieval.models.hub.fetch_tag", lambda *args: weight_file)
    siglip = find_source(ModelOptions(vision_model="ViT-B-16-SigLIP", pretrained="webli"), typed_model=True)
    assert siglip.preprocess["mean"] == [0.5, 0.5, 0.5]
    assert siglip.preprocess["resize_mode"] == "squash"
    # A file of a model whose tags all agree is prepared as they are.
    from_file = find_source(ModelOptions(vision_model="ViT-B-16-SigLIP", pretrained=weight_file), typed_model=True)
    assert from_file.preprocess == siglip.preprocess


def test_clip_trainings_rn50_has_the_text_layers_of_its_file(tmp_path):
    state = small_clip(True, text_cfg={**TEXT, "layers": 1}).state_dict()
    content = {"epoch": 0, "global_step": 1, "model_state_dict": state, "optimizer_state_dict": {}}
    torch.save(content, tmp_path / "checkpoint_0_1.pt")
    source = find_source(
        ModelOptions(vision_model="RN50", pretrained=str(tmp_path / "checkpoint_0_1.pt")), typed_model=True
    )
    assert source.config["text_cfg"]["layers"] == 1
    assert source.config["quick_gelu"]
    assert source.preprocess["mean"] == [0.4225, 0.4012, 0.3659]


def test_model_state_dict_alone_is_not_clip_training(config_file, tmp_path):
    content = {"epoch": 3, "model_state_dict": small_clip(seed=1).state_dict(), "optimizer_state_dict": {}, "loss": 1}
    torch.save(content, tmp_path / "tutorial.pt")
    built = build_model(ModelOptions(vision_model=config_file, pretrained=str(tmp_path / "tutorial.pt")))
    assert torch.allclose(features(built.clip), features(small_clip(seed=1)), atol=1e-6)
    assert activation_of_text(built) == "GELU"
    assert built.preprocess == build_model(ModelOptions(vision_model=config_file)).preprocess


@pytest.fixture(scope="module")
def clip_training_file(tmp_path_factory):
    """A checkpoint as clip-training writes it, of its one model, and the model."""
    sizes = get_model_config("RN50")
    sizes["text_cfg"]["layers"] = 6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = CLIP(**sizes, quick_gelu=True).eval()
    path = tmp_path_factory.mktemp("clip-training") / "checkpoint_34_9999.pt"
    torch.save({"epoch": 34, "global_step": 9999, "model_state_dict": model.state_dict()}, path)
    return model, str(path)


@pytest.mark.parametrize("typed", [None, "RN50-text6", "RN50"])
def test_clip_training_checkpoint_gives_its_features(clip_training_file, typed):
    model, path = clip_training_file
    options = ModelOptions(pretrained=path) if typed is None else ModelOptions(vision_model=typed, pretrained=path)
    built = build_model(options, typed_model=typed is not None)
    ids = build_tokenizer(ModelOptions(), built)(["a dog runs", "two cats"])
    with torch.no_grad():
        assert torch.equal(built.clip.encode_text(ids), model.encode_text(ids))
    assert all(torch.equal(v, built.clip.state_dict()[name]) for name, v in model.state_dict().items())
    assert built.name == (typed or "RN50-text6")
    assert (built.preprocess["mean"], built.preprocess["std"]) == ([0.4225, 0.4012, 0.3659], [0.2681, 0.2635, 0.2763])
    assert (built.preprocess["resize_mode"], built.preprocess["size"]) == ("shortest", 224)


def test_clip_trainings_model_name_has_random_weights():
    with torch.device("meta"):
        built = build_model(ModelOptions(vision_model="RN50-text6"))
        reference = CLIP(**get_model_config("RN50"))
    shapes = {name: value.shape for name, value in reference.state_dict().items()}
    later = tuple(f"transformer.resblocks.{layer}." for layer in range(6, 12))
    expected = {name: shape for name, shape in shapes.items() if not name.startswith(later)}
    assert {name: value.shape for name, value in built.clip.state_dict().items()} == expected
    assert activation_of_text(built) == "QuickGELU" and built.weights == "none"


def activation_of_text(built):
    return type(built.clip.transformer.resblocks[0].mlp.gelu).__name__


def test_clip_itms_checkpoint_loads_under_openais_name(tmp_path):
    with torch.device("meta"):
        own = CLIP(**get_model_config("ViT-B-32")).state_dict()
    half = torch.full((5 * 10**7,), 0.5).half()  # all are views of it: a file of 100 MB instead of 300
    state = {name: half[: v.numel()].view(v.shape) for name, v in own.items()}
    torch.save({"epoch": 1, "name": "ex0", "state_dict": state, "optimizer": {}}, tmp_path / "epoch1.pt")
    built = build_model(ModelOptions(vision_model="ViT-B/32", pretrained=str(tmp_path / "epoch1.pt")))
    assert (built.name, built.preprocess["size"], activation(built)) == ("ViT-B/32", 224, "QuickGELU")
    assert all((v == 0.5).all() for v in built.clip.state_dict().values())


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("bias", [None, -5.0])
def test_siglip_initial_values_come_from_the_config_or_siglip(tmp_path, scale, bias):
    named = {"init_logit_scale": scale, "init_logit_bias": bias}
    config = small_config(**{key: value for key, value in named.items() if value is not None})
    (tmp_path / "siglip.json").write_text(json.dumps(config))
    clip = build_model(ModelOptions(vision_model=str(tmp_path / "siglip.json")), logit_bias=True).clip
    expected = scale or math.log(10), bias or -10
    assert (clip.logit_scale.item(), clip.logit_bias.item()) == pytest.approx(expected)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"preprocess_cfg": [1]}, "preprocess_cfg is a list, not a dict"),
        ({"preprocess_cfg": {"mean": [1, 2]}}, "preprocess_cfg.mean has 2 values, not 3"),
        ({"preprocess_cfg": {"std": ["a", "b", "c"]}}, r"preprocess_cfg.std\[0\] is 'a', not a finite number above 0"),
        ({"vision_cfg": {**VIT, "image_size": "64"}}, "vision_cfg.image_size is '64', not a whole number .*"),
        ({"text_cfg": {**TEXT, "hf_config": None}}, "text_cfg.hf_config is None, not a dict"),
    ],
)
def test_config_of_wrong_values_is_refused_in_one_line(tmp_path, changes, words):
    preprocess = changes.pop("preprocess_cfg", {})
    content = {"model_cfg": small_config(**changes), "preprocess_cfg": preprocess}
    (tmp_path / "broken.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"^[^\n]*broken.json is not a model config: [^\n]*{words}$"):
        build_model(ModelOptions(vision_model=str(tmp_path / "broken.json")))


def test_checkpoint_of_ours_decides_the_model(config_file, tmp_path):
    trained = build_model(ModelOptions(vision_model=config_file))
    path = as_checkpoint(trained, tmp_path / "best.pt", vision_model=config_file)
    built = build_model(ModelOptions(pretrained=path))
    assert torch.equal(features(built.clip), features(trained.clip))
    assert (built.name, built.config) == (config_file, trained.config)


def test_message_names_typed_model_and_contradicting_checkpoint(config_file, tmp_path):
    path = as_checkpoint(
        build_model(ModelOptions(vision_model=config_file)), tmp_path / "best.pt", vision_model=config_file
    )
    build_model(ModelOptions(vision_model=config_file, pretrained=path), typed_model=True)
    same = tmp_path / "same.json"
    shutil.copy(config_file, same)
    build_model(ModelOptions(vision_model=str(same), pretrained=path), typed_model=True)
    with pytest.raises(UserError, match=r"--vision_model tiny contradicts .*best.pt, which holds a .*small.json"):
        build_model(ModelOptions(vision_model="tiny", pretrained=path), typed_model=True)


def test_adaptor_weights_are_returned(config_file, tmp_path):
    built = build_model(ModelOptions(vision_model=config_file))
    adaptor = {"adaptor.0.weight": torch.randn(6, 24), "adaptor.2.weight": torch.randn(24, 6)}
    again = rebuild_model(built.config, built.preprocess, {**built.clip.state_dict(), **adaptor}, "small", "last.pt")
    assert again.adaptor_state.keys() == {"0.weight", "2.weight"}


def test_siglip_initialises_scale_and_bias_if_weights_have_no_bias(config_file, weight_file, tmp_path):
    for pretrained in ("none", weight_file):
        built = build_model(ModelOptions(vision_model=config_file, pretrained=pretrained), logit_bias=True)
        assert built.clip.logit_scale.item() == pytest.approx(math.log(10))
        assert built.clip.logit_bias.item() == -10
    built.clip.logit_bias.data.fill_(-7)
    built.clip.logit_scale.data.fill_(4)
    again = build_model(ModelOptions(pretrained=as_checkpoint(built, tmp_path / "last.pt")), logit_bias=True)
    assert (again.clip.logit_scale.item(), again.clip.logit_bias.item()) == (4, -7)


def test_without_siglip_only_weights_with_a_bias_have_a_bias(config_file, weight_file, tmp_path):
    built = build_model(ModelOptions(vision_model=config_file, pretrained=weight_file))
    assert built.clip.logit_bias is None
    torch.save({**built.clip.state_dict(), "logit_bias": torch.tensor(-3.0)}, tmp_path / "siglip.pt")
    built = build_model(ModelOptions(vision_model=config_file, pretrained=str(tmp_path / "siglip.pt")))
    assert built.clip.logit_bias.item() == -3


def test_image_size_that_does_not_fit_the_patches_is_refused(config_file):
    with pytest.raises(UserError, match=r"--image_size 30: must be a multiple of 8"):
        build_model(ModelOptions(vision_model=config_file, image_size=30))


def test_timm_tower_is_resized_to_another_image_size(tmp_path, monkeypatch):
    tower = {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}
    path = tmp_path / "timm.json"
    path.write_text(json.dumps(small_config(vision_cfg=tower)))
    large = build_model(ModelOptions(vision_model=str(path)))
    torch.save(large.clip.state_dict(), tmp_path / "timm.pt")
    options = ModelOptions(vision_model=str(path), pretrained=str(tmp_path / "timm.pt"), image_size=64)
    built = build_model(options)
    assert features(built.clip, 64).isfinite().all()
    again = rebuild_model(built.config, built.preprocess, built.clip.state_dict(), "timm", "last.pt")
    assert torch.equal(features(again.clip, 64), features(built.clip, 64))

    path.write_text(json.dumps(small_config(vision_cfg=tower | {"image_size": [64, 96]})))
    assert build_model(ModelOptions(vision_model=str(path))).preprocess["size"] == [64, 96]

    def refuse(tower, size):
        raise AssertionError("not a multiple of the window")

    monkeypatch.setattr("open_clip.timm_model.TimmModel.set_input_size", refuse)
    with pytest.raises(UserError, match=r"--image_size 65: must be a multiple of 16 for .*timm.json"):
        build_model(ModelOptions(vision_model=str(path), image_size=65))
    with pytest.raises(UserError, match=r"--image_size 48: .*multiple of the window"):
        build_model(ModelOptions(vision_model=str(path), image_size=48))


@pytest.fixture
def folder(tmp_path):
    """A local-dir: folder with config and weights."""
    path = tmp_path / "model"
    path.mkdir()
    content = {"model_cfg": small_config(quick_gelu=True), "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (path / "open_clip_config.json").write_text(json.dumps(content))
    save_file(small_clip(seed=1, quick_gelu=True).state_dict(), path / "open_clip_model.safetensors")
    return path


def test_local_folder_has_its_own_config_weights_and_preprocessing(folder):
    built = build_model(ModelOptions(vision_model=f"local-dir:{folder}"))
    assert torch.allclose(features(built.clip), features(small_clip(seed=1, quick_gelu=True)), atol=1e-6)
    assert (built.weights, built.preprocess["mean"]) == ("own", [0.1, 0.2, 0.3])
    assert build_tokenizer(ModelOptions(), built)(["a dog"]).shape == (1, 16)


def test_local_folder_without_weights_is_refused(folder):
    (folder / "open_clip_model.safetensors").unlink()
    name = f"local-dir:{folder}"
    with pytest.raises(UserError, match=r"holds no weights.*--pretrained none"):
        build_model(ModelOptions(vision_model=name))
    assert build_model(ModelOptions(vision_model=name, pretrained="none")).weights == "none"


def test_hugging_face_text_tower_is_rebuilt_from_its_stored_config(tmp_path):
    from transformers import RobertaConfig

    hf = RobertaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    hf.save_pretrained(tmp_path / "roberta")
    text = {"hf_model_name": str(tmp_path / "roberta"), "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
    (tmp_path / "small.json").write_text(json.dumps(small_config(text_cfg=text)))
    built = build_model(ModelOptions(vision_model=str(tmp_path / "small.json")))
    shutil.rmtree(tmp_path / "roberta")
    config = json.loads(json.dumps(built.config))
    again = rebuild_model(config, built.preprocess, built.clip.state_dict(), "small", "last.pt")
    ids = torch.tensor([[0, 5, 6, 2, 1, 1]])
    with torch.no_grad():
        assert torch.equal(again.clip.encode_text(ids), built.clip.encode_text(ids))


@pytest.mark.parametrize(("kind", "limit"), [("roberta", 30), ("bert", 32)])
def test_context_length_is_at_most_the_positions_of_a_hugging_face_tower(kind, limit, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    hf_config = {"model_type": kind, "vocab_size": 99, "max_position_embeddings": 32, **sizes}
    text = {"hf_model_name": kind, "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear", "hf_config": hf_config}
    path = tmp_path / "small.json"
    path.write_text(json.dumps(small_config(text_cfg=text | {"context_length": 16})))
    assert build_model(ModelOptions(vision_model=str(path), context_length=limit))
    for length in (limit + 1, 40):
        with pytest.raises(UserError, match=f"--context_length {length}: must be at most {limit} for"):
            build_model(ModelOptions(vision_model=str(path), context_length=length))


@pytest.mark.parametrize("pad", [0, 5])
def test_text_is_trimmed_only_if_the_tower_masks_the_tokenizers_padding(pad, tmp_path):
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "a", "dog"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    saved.save_pretrained(tmp_path / "words")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {"hf_model_name": "bert", "hf_pooler_type": "cls_last_hidden_state_pooler", "hf_proj_type": "linear"}
    text |= {"hf_config": {"model_type": "bert", "vocab_size": 9, "pad_token_id": pad, **sizes}, "context_length": 8}
    text["hf_tokenizer_name"] = str(tmp_path / "words")
    (tmp_path / "small.json").write_text(json.dumps(small_config(text_cfg=text)))
    options = Options.from_flat({"vision_model": str(tmp_path / "small.json")})
    model, _, built_tokenizer = load_model(options, None)
    assert model.trims_text == (pad == 0)
    ids = built_tokenizer(["a dog"])
    with torch.no_grad():
        difference = (model.eval().encode_text(ids) - model.encode_text(ids[:, :2])).abs().max()
    assert (difference < 1e-6) == (pad == 0)


def test_unknown_tag_lists_the_known_tags(config_file):
    with pytest.raises(UserError) as error:
        build_model(ModelOptions(pretrained="laion2b_s34b_b79"))
    assert "did you mean laion2b_s34b_b79k" in str(error.value)
    assert "openai" in str(error.value)
    with pytest.raises(UserError, match=r"--pretrained openai is neither .*no tags"):
        build_model(ModelOptions(vision_model="tiny", pretrained="openai"))


@pytest.mark.parametrize("name", ["absent.pt", "folder/absent"])
def test_missing_path_is_reported_as_a_missing_file(name):
    with pytest.raises(UserError, match=f"{name}: no such weight file"):
        build_model(ModelOptions(pretrained=name))


def test_known_tags():
    assert "openai" in known_tags("ViT-B/32")
    assert known_tags("ViT-B/32") == known_tags("ViT-B-32")
    assert known_tags("tiny") == known_tags("Chinese-CLIP") == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, ["ViT-B/32", "timm/vit_base_patch32_clip_224.openai", *OPENAI_FILE, "--pretrained FILE"]),
        ({"vision_model": "ViT-B-16-SigLIP", "pretrained": "webli"}, ["timm/ViT-B-16-SigLIP", "--pretrained FILE"]),
        ({"vision_model": "hf-hub:nobody/nothing"}, ["hf-hub:nobody/nothing", "local-dir:PATH"]),
        ({"vision_model": "roberta-ViT-B-32"}, ["roberta-ViT-B-32", "roberta-base"]),
    ],
)
def test_without_network_one_line_names_the_missing_file_quickly(options, named, no_network, caplog, recwarn):
    began = time.perf_counter()
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError) as error:
        build_model(ModelOptions(**options))
    assert time.perf_counter() - began < 5
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in named)
    assert not caplog.records


def test_tokenizer_that_cannot_be_fetched_is_named(no_network):
    built = build_model(ModelOptions(vision_model="tiny"))
    built.config["text_cfg"]["hf_tokenizer_name"] = "nobody/nothing"
    with pytest.raises(UserError, match="nobody/nothing of tiny could not be read"):
        build_tokenizer(ModelOptions(), built)


def test_tokenizer_option_of_a_clip_model_is_refused():
    with pytest.raises(UserError, match="CLIP's own tokenizer"):
        build_tokenizer(ModelOptions(tokenizer="vocab.txt"), build_model(ModelOptions(vision_model="tiny")))


def test_vocabulary_larger_than_the_text_tower_is_refused(tmp_path):
    (tmp_path / "few.json").write_text(json.dumps(small_config(text_cfg={**TEXT, "vocab_size": 100})))
    built = build_model(ModelOptions(vision_model=str(tmp_path / "few.json")))
    with pytest.raises(UserError, match=r"49,408 tokens, the text tower 100"):
        build_tokenizer(ModelOptions(), built)


def test_weights_of_another_model_are_refused(weight_file, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps(small_config(vision_cfg={**VIT, "layers": 1})))
    with pytest.raises(UserError, match=r"small.pt does not fit .*other.json: 12 unexpected"):
        build_model(ModelOptions(vision_model=str(tmp_path / "other.json"), pretrained=weight_file))


def test_random_coca_has_no_uninitialised_weights(tmp_path):
    text = TEXT | {"embed_cls": True, "output_tokens": True}
    config = small_config(text_cfg=text, multimodal_cfg=TEXT | {"attn_pooler_heads": 2})
    config["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    (tmp_path / "coca.json").write_text(json.dumps(config))
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
        try:
            states.append(build_model(ModelOptions(vision_model=str(tmp_path / "coca.json"))).clip.state_dict())
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(value.isfinite().all() or name.endswith("attn_mask") for name, value in states[0].items())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
