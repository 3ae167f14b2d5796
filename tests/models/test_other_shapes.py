"""Weight files of every system with tensors of wrong shapes are read, or refused in one line, and never crash."""

import json
import math
import random

import pytest
import torch

from clip_retrieval.errors import UserError
from clip_retrieval.models.build import build_model
from clip_retrieval.options import ModelOptions
from tests.models.small import TEXT, small_clip, small_config
from tests.models.test_chinese_clip import checkpoint as chinese_checkpoint
from tests.models.test_simple_clip_weights import Reference

SMALL_TEXT = {**TEXT, "vocab_size": 64}
OTHER_SHAPES = [
    lambda v: v.reshape(-1),
    lambda v: v[None],
    lambda v: v.sum(),
    lambda v: torch.zeros(0),
    lambda v: torch.zeros(3, 3),
    lambda v: torch.zeros(1, 2, 3, 4, 5),
    lambda v: v.T if v.ndim == 2 else v[None, None],
    lambda v: torch.cat([v, v]) if v.ndim else v[None],
    lambda v: v.long(),
    lambda v: v * math.nan,
    lambda v: torch.complex(v.float(), v.float()),
]


def chinese(folder, **how):
    return torch.load(chinese_checkpoint(folder, **how), weights_only=True)["state_dict"]


STATES = {
    "a CLIP": lambda folder: small_clip(text_cfg=SMALL_TEXT).state_dict(),
    "Chinese-CLIP": chinese,
    "Chinese-CLIP's ResNet": lambda folder: chinese(folder, resnet=True),
    "simple-clip": lambda folder: Reference().state_dict(),
    "Clip_crossmodal_retrieval": lambda folder: {
        **{f"clip_model.{name}": v for name, v in small_clip(text_cfg=SMALL_TEXT).state_dict().items()},
        "additional_layers.fc.0.weight": torch.zeros(6, 24),
        "additional_layers.fc.2.weight": torch.zeros(24, 6),
    },
}


@pytest.fixture(params=STATES)
def state(request, tmp_path):
    return STATES[request.param](tmp_path)


def build(state, folder):
    """Build the model of a state dict, or return the error message."""
    (folder / "small.json").write_text(json.dumps(small_config(text_cfg=SMALL_TEXT)))
    torch.save({"state_dict": state}, folder / "weights.pt")
    is_whole = any("bert." in name or name.startswith("text_encoder.") for name in state)
    options = {} if is_whole else {"vision_model": str(folder / "small.json")}
    try:
        return build_model(ModelOptions(pretrained=str(folder / "weights.pt"), **options), typed_model=not is_whole)
    except UserError as error:
        assert str(folder / "weights.pt") in str(error) and "\n" not in str(error), error
        return str(error)


def test_unchanged_state_is_built(state, tmp_path):
    assert not isinstance(build(state, tmp_path), str)


def test_tensor_of_another_shape_is_refused(state, tmp_path):
    rng = random.Random(0)
    for shape in OTHER_SHAPES:
        name = rng.choice([name for name in state if "pooler" not in name])
        build({**state, name: shape(state[name])}, tmp_path)


def test_wrong_shape_of_a_tensor_used_for_inference_is_refused(state, tmp_path):
    """Sizes of a model are inferred from these tensors; without them there is no model."""
    telling = ("conv1.weight", "word_embeddings.weight", "text_projection", "positional_embedding", "b", "logit_scale")
    names = [name for name in state if name.endswith(telling)]
    for name in random.Random(0).sample(names, min(5, len(names))):
        for shape in (OTHER_SHAPES[0], OTHER_SHAPES[1], OTHER_SHAPES[3], OTHER_SHAPES[5]):
            build({**state, name: shape(state[name])}, tmp_path)
    without = {name: v for name, v in state.items() if not name.endswith(telling)}
    assert isinstance(build(without, tmp_path), str)


@pytest.mark.parametrize(
    "name", ["image_encoder.model.patch_embed.0.rbr_conv.0.conv.weight", "", ".", "bert.x", "\ud800"]
)
def test_tensor_name_of_another_system_is_refused(tmp_path, name):
    state = small_clip(text_cfg=SMALL_TEXT).state_dict() | {name: torch.zeros(2)}
    assert isinstance(build(state, tmp_path), str)
