"""Model configs with wrong values are refused in one line that names the file."""

import copy
import json
import os
import random

import pytest
import torch
from open_clip import CustomTextCLIP

from clip_retrieval.errors import UserError
from clip_retrieval.models.build import build_model
from clip_retrieval.models.memory import build_within_memory
from clip_retrieval.models.tokenizers import build_tokenizer
from clip_retrieval.options import ModelOptions
from tests.models.small import RESNET, TEXT, VIT, WORDS, small_config, small_simple_config
from tests.models.test_remote_code import ROBERTA, TOWER


def build(path):
    options = ModelOptions(vision_model=str(path))
    built = build_model(options, typed_model=True)
    return built, build_tokenizer(options, built)


def refusal(path):
    """Return the error message for a model config; it is one line."""
    with pytest.raises(UserError) as error:
        build(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def write_config(folder, config, preprocess=None):
    path = folder / "model.json"
    content = config if preprocess is None else {"model_cfg": config, "preprocess_cfg": preprocess}
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"embed_dim": ' + b"9" * 5000 + b"}",
        b'{"embed_dim": NaN, "vision_cfg": {}, "text_cfg": {}}',
        b"null",
        b'"text"',
        b'{"model_cfg": null}',
        b'{"model_cfg": [1]}',
    ],
)
def test_file_without_a_config_is_refused(tmp_path, content):
    (tmp_path / "model.json").write_bytes(content)
    assert "is not a model config" in refusal(tmp_path / "model.json")


def test_path_that_is_not_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo.json")
    assert "not a regular file" in refusal(tmp_path / "fifo.json")
    (tmp_path / "folder.json").mkdir()
    refusal(tmp_path / "folder.json")
    assert "no such model config" in refusal(tmp_path / "absent.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    refusal(tmp_path / "zero.json")


@pytest.mark.parametrize("missing", ["embed_dim", "vision_cfg", "text_cfg"])
def test_config_without_a_part_is_refused(tmp_path, missing):
    config = small_config()
    del config[missing]
    assert f"has no {missing}" in refusal(write_config(tmp_path, config))


@pytest.mark.parametrize(
    "preprocess, words",
    [
        ({"mean": [0.1, 0.2]}, "mean"),
        ({"mean": "0.5"}, "mean"),
        ({"mean": [None] * 3}, "mean"),
        ({"std": [0.1, 0, 0.1]}, "std"),
        ({"std": -1}, "std"),
        ({"std": 10**400}, "std"),
        ({"mean": [0, 0, -(10**400)]}, "mean"),
        ({"fill_color": 10**400}, "fill_color"),
        ({"std": [True] * 3}, "std"),
        ({"resize_mode": "crop"}, "resize_mode"),
        ({"interpolation": "nearest"}, "interpolation"),
        ({"interpolation": 3}, "interpolation"),
        ({"fill_color": "black"}, "fill_color"),
        ({"fill_color": 256}, "fill_color"),
        ({"fill_color": [0, 0]}, "fill_color"),
        ({"mode": "L"}, "mode"),
        ({"size": 0}, "size"),
        ({"size": [16, 16, 16]}, "size"),
    ],
)
def test_wrong_preprocessing_values_are_refused(tmp_path, preprocess, words):
    assert words in refusal(write_config(tmp_path, small_config(), preprocess))


@pytest.mark.parametrize(
    "values, expected",
    [([0, 0, 0], [0.0] * 3), ([1, 0.5, 0], [1.0, 0.5, 0.0]), (0.5, [0.5] * 3), (1, [1.0] * 3), (None, None)],
)
def test_mean_may_be_integers_or_one_number(tmp_path, values, expected):
    built, _ = build(write_config(tmp_path, small_config(), {"mean": values, "std": 1}))
    assert expected is None or built.preprocess["mean"] == expected
    assert built.preprocess["std"] == [1.0] * 3 and all(type(v) is float for v in built.preprocess["mean"])


@pytest.mark.parametrize(
    "changes",
    [
        {"vision_cfg": {**VIT, "patch_size": 32}},
        {"vision_cfg": {**VIT, "patch_size": 0}},
        {"vision_cfg": {**VIT, "image_size": 0}},
        {"vision_cfg": {**VIT, "image_size": -16}},
        {"vision_cfg": {**VIT, "image_size": 10**6}},
        {"vision_cfg": {**VIT, "image_size": [16, "16"]}},
        {"vision_cfg": {**VIT, "image_size": 4096, "patch_size": 1}},
        {"vision_cfg": {**VIT, "width": 33}},
        {"vision_cfg": {**VIT, "head_width": 0}},
        {"vision_cfg": {**VIT, "head_width": 48}},
        {"vision_cfg": {**VIT, "width": "wide"}},
        {"vision_cfg": {**VIT, "layers": -1.5}},
        {"vision_cfg": {**VIT, "pool_type": "none of these"}},
        {"vision_cfg": {**VIT, "norm_kwargs": {"eps": "small"}}},
        {"vision_cfg": {**VIT, "act_kwargs": {"approximate": "badly"}}},
        {"vision_cfg": {**VIT, "unknown": 1}},
        {"vision_cfg": {**RESNET, "head_width": 7}},
        {"vision_cfg": {**RESNET, "layers": [1, 1, 1]}},
        {"vision_cfg": {**RESNET, "image_size": 8}},
        {"text_cfg": {**TEXT, "heads": 3}},
        {"text_cfg": {**TEXT, "heads": 0}},
        {"text_cfg": {**TEXT, "context_length": 0}},
        {"text_cfg": {**TEXT, "context_length": 10**9}},
        {"text_cfg": {**TEXT, "vocab_size": -1}},
        {"text_cfg": {**TEXT, "pool_type": 3}},
        {"text_cfg": {**TEXT, "hf_tokenizer_name": 5}},
        {"text_cfg": {**TOWER, "hf_config": ROBERTA | {"num_attention_heads": 3}}},
        {"text_cfg": {**TOWER, "hf_config": ROBERTA | {"hidden_act": "none"}}},
        {"text_cfg": {**TOWER, "hf_config": ROBERTA | {"hidden_size": "wide"}}},
        {"text_cfg": {**TOWER, "hf_config": ROBERTA | {"max_position_embeddings": 4}}},
        {"text_cfg": {**TOWER, "hf_config": ROBERTA, "hf_pooler_type": "none of these"}},
        {"embed_dim": "24"},
        {"embed_dim": 0},
        {"embed_dim": True},
        {"quick_gelu": "yes"},
        {"init_logit_bias": "none"},
        {"init_logit_scale": None},
        {"multimodal_cfg": 1},
        {"unknown": 1},
    ],
)
def test_wrong_model_values_are_refused(tmp_path, changes):
    refusal(write_config(tmp_path, small_config(**changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"vision_cfg": {**VIT, "layers": 10**9}},
        {"vision_cfg": {**RESNET, "layers": [1, 1, 1, 10**9]}},
        {"text_cfg": {**TEXT, "layers": 10**9}},
        {"text_cfg": {**TOWER, "hf_config": ROBERTA | {"num_hidden_layers": 10**9}}},
        {"vision_cfg": {**VIT, "width": 2**24}},
        {"vision_cfg": {**VIT, "mlp_ratio": 1e12}},
        {"text_cfg": {**TEXT, "vocab_size": 10**14}},
        {"text_cfg": {**TOWER, "hf_config": ROBERTA | {"vocab_size": 10**14}}},
    ],
)
def test_model_larger_than_memory_is_refused(tmp_path, changes, monkeypatch):
    monkeypatch.setattr("clip_retrieval.models.memory.MOST_TENSORS", 500)
    message = refusal(write_config(tmp_path, small_config(**changes)))
    assert "GB of free memory" in message or "more than 500 tensors" in message


def test_memory_is_checked_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr("clip_retrieval.models.memory.free_memory", lambda: 4000)
    assert build_within_memory(lambda: torch.nn.Linear(10, 40), "x").weight.device.type == "cpu"
    for make in (
        lambda: torch.nn.Linear(30, 40),
        lambda: torch.randn(2000),
        lambda: torch.zeros(600, 2, dtype=torch.int64),
    ):
        with pytest.raises(UserError, match=r"x needs more than the 0\.0 GB of free memory"):
            build_within_memory(make, "x")


def test_refusing_a_large_model_needs_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_retrieval.models.memory.free_memory", lambda: 4 * 10**8)
    taken, normal = [], torch.Tensor.uniform_

    def uniform(tensor, *arguments, **options):
        taken.append(0 if tensor.is_meta else tensor.nbytes)
        return normal(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    assert "GB of free memory" in refusal(
        write_config(tmp_path, small_config(vision_cfg={**VIT, "width": 2**14, "layers": 3}))
    )
    assert taken and sum(taken) < 10**8


@pytest.mark.parametrize("tower", ["vit_base_patch32_224", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_building_a_large_model_changes_no_weight(tower, monkeypatch):
    monkeypatch.setattr("clip_retrieval.models.memory.LARGE", 10**9)
    vision = {"timm_model_name": tower, "timm_model_pretrained": False, "image_size": 224, "timm_proj": "linear"}
    weights = []
    for wrap in (lambda build, name: build(), build_within_memory):
        torch.manual_seed(0)
        weights.append(wrap(lambda: CustomTextCLIP(24, dict(vision), dict(TEXT)), "x").state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_module_that_reads_its_weights_in_init_is_built(monkeypatch):
    class Sorted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(100_000).sort().values)
            assert self.weight[0].item() < self.weight[-1].item()

    monkeypatch.setattr("clip_retrieval.models.memory.LARGE", 10**9)
    assert not build_within_memory(Sorted, "x").weight.is_meta


SEEDS = {
    "vit": small_config(custom_text=False, quick_gelu=False, init_logit_scale=2.6, init_logit_bias=-10),
    "resnet": small_config(True),
    "timm": small_config(vision_cfg={"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}),
    "roberta": small_config(text_cfg={**TOWER, "hf_config": ROBERTA}),
    "simple": small_simple_config(len(WORDS), vocab=WORDS),
}
VALUES = [
    None,
    "x",
    "",
    -1,
    0,
    1,
    7,
    10**6,
    10**30,
    1.5,
    -0.5,
    1e300,
    [],
    {},
    [1],
    ["x"],
    [1, 1],
    {"x": 1},
    True,
    "hf-hub:x/y",
]


@pytest.mark.parametrize("kind", SEEDS)
def test_mutated_config_is_read_or_refused(tmp_path, kind, no_network):
    """Replace each value of a config by a random one of another type or size, or delete it."""
    rng = random.Random(kind)
    for _ in range(12):
        config = copy.deepcopy(SEEDS[kind])
        holder, name = rng.choice(list(places(config)))
        if rng.random() < 0.1 and isinstance(holder, dict):
            del holder[name]
        else:
            holder[name] = rng.choice(VALUES)
        path = write_config(tmp_path, config)
        try:
            _, tokenizer = build(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error), error
        else:
            assert len(tokenizer(["a dog"])) == 1


def places(value):
    """Every (dict or list, key) in a nested value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield value, name
        yield from places(inner)
