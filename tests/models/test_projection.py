import warnings
from copy import deepcopy

import pytest
import torch
from open_clip import factory
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP

from clip_retrieval.errors import UserError
from clip_retrieval.models import names
from clip_retrieval.models.projection import text_projection, vision_projection
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.models.trainable import set_trainable
from tests.models.small import small_preprocess, small_towers, token_ids

IMAGE_PROJECTIONS = {
    "timm": {"head.proj.weight"},
    "timm mlp": {"head.mlp.fc1.weight", "head.mlp.fc1.bias", "head.mlp.fc2.weight"},
    "eva": {"trunk.head.weight", "trunk.head.bias"},
    "mobileclip": {"trunk.head.fc.weight", "trunk.head.fc.bias"},
    "mobileclip-b": {"trunk.head.weight", "trunk.head.bias"},
    "pe": {"trunk.head.weight", "trunk.head.bias"},
    "abs_attn": {"head.pool.proj.weight", "head.pool.proj.bias"},
    "rot_attn": {"head.pool.proj.weight", "head.pool.proj.bias"},
    "attn and linear": {"head.proj.weight"},
    "vit": {"proj"},
    "custom text": {"proj"},
    "resnet": {"attnpool.c_proj.weight", "attnpool.c_proj.bias"},
    "hugging face": {"proj"},
    "simple-clip": {"head.0.weight", "head.2.weight"},
    "coca": {"proj"},
}
SLOW = pytest.mark.slow
KINDS = [pytest.param(kind, marks=SLOW if kind in ("eva", "pe") else ()) for kind in IMAGE_PROJECTIONS]


@pytest.mark.parametrize("kind", KINDS)
def test_image_projection_is_the_last_layer_of_the_tower(kind):
    clip, _ = small_towers(kind)
    model = RetrievalModel(clip, small_preprocess())
    set_trainable(model, "linear_projection", freeze_text=True)
    assert {n for n, p in clip.visual.named_parameters() if p.requires_grad} == IMAGE_PROJECTIONS[kind]


@pytest.mark.parametrize("kind", [*KINDS, "siglip"])
@pytest.mark.parametrize("adaptor", [False, True])
def test_projection_can_be_computed_separately(kind, adaptor):
    torch.manual_seed(0)
    clip, size = small_towers(kind)
    model = RetrievalModel(clip, small_preprocess(size), adaptor=adaptor).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    ids = token_ids([4, 9, 6], 16)
    with torch.no_grad():
        whole = model.encode_image(images), model.encode_text(ids)
        pooled = model.pooled_image(images), model.pooled_text(ids)
        projected = model.project_image(pooled[0]), model.project_text(pooled[1])
    for features, reference in zip(projected, whole, strict=True):
        torch.testing.assert_close(features, reference, rtol=0, atol=2e-6)
    assert pooled[0].ndim == 2 and pooled[1].shape[1] == 32
    assert (pooled[0].shape[1] != 24) == (kind not in ("coca", "attn and linear"))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), whole[0])


def test_tower_without_a_projection_is_refused_unless_frozen():
    model = RetrievalModel(small_towers("siglip")[0], small_preprocess())
    with pytest.raises(UserError, match="image tower has no projection; add --freeze_vision to train only the other"):
        set_trainable(model, "linear_projection")
    set_trainable(model, "linear_projection", freeze_vision=True)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"clip.text.text_projection", "clip.logit_scale"}


NO_IMAGE_PROJECTION = ("SigLIP", "-siglip")
NO_TEXT_PROJECTION = ("ViT-SO400M-16-SigLIP-i18n-256",)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_projections_of_all_configs_of_open_clip_are_found():
    found = 0
    for name in names.open_clip_names():
        clip = on_meta(factory.get_model_config(name))
        image, text = vision_projection(clip).parameters(), text_projection(clip).parameters()
        assert bool(image) != any(part in name for part in NO_IMAGE_PROJECTION), name
        assert bool(text) != (name in NO_TEXT_PROJECTION), name
        assert not image or image[-1].shape[-1] == clip_dim(name) or image[-1].shape[0] == clip_dim(name), name
        found += 1
    assert found > 100


def clip_dim(name):
    return factory.get_model_config(name)["embed_dim"]


def on_meta(config):
    """Build a model without weights; a Hugging Face text tower, whose config is on the hub, as a small one."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    if vision.get("timm_model_name"):
        vision["timm_model_pretrained"] = False
    hugging_face = text.get("hf_model_name")
    if hugging_face:
        text = {"width": 64, "heads": 1, "layers": 1}
    custom_text = config.pop("custom_text", False) or hugging_face
    make = CoCa if "multimodal_cfg" in config else CustomTextCLIP if custom_text else CLIP
    with torch.device("meta"), warnings.catch_warnings():
        return make(**deepcopy(config | {"text_cfg": text}))
