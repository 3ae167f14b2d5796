"""Every kind of image tower takes other image sizes, with the features that open_clip computes at them."""

import json
from types import SimpleNamespace

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F

from clip_retrieval.errors import UserError
from clip_retrieval.models import names
from clip_retrieval.models.build import BuiltModel, _build, build_model, rebuild_model
from clip_retrieval.models.image_size import height_and_width, patch_size, resize_image_tower
from clip_retrieval.models.source import find_source
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import ModelOptions
from tests.models.small import RESNET, TEXT, VIT, small_clip, small_config

TINY = {"embed_dim": 32, "depth": 1, "num_heads": 2}
EVA = {**TINY, "mlp_ratio": 2}
SWIN = {"embed_dim": 16, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
VITAMIN = {"depth": 1, "num_heads": 2, "mlp_ratio": 0.5}
FASTVIT = {"layers": (1,) * 4, "embed_dims": (16, 16, 32, 32)}
CONVNEXT = {"depths": (1,) * 4, "dims": (8, 16, 24, 32)}
KINDS = {
    "vit": (16, 8, 24, {}),
    "coca": (16, 8, 24, {"attentional_pool": True, "attn_pooler_heads": 2}),
    "resnet": (32, 64, 96, {}),
    "vit_base_patch16_siglip_224": (224, 112, 256, "map", EVA),
    "vit_base_mci_224": (224, 112, 256, "token", {"depth": 1}),
    "eva_giant_patch14_224": (224, 112, 252, "token", EVA),
    "eva02_base_patch16_clip_224": (224, 112, 256, "token", EVA),
    "vit_pe_core_tiny_patch16_384": (384, 112, 256, "map", {**TINY, "attn_pool_num_heads": 2}),
    "swin_base_patch4_window7_224": (224, 96, 256, "avg", SWIN),
    "vit_relpos_medium_patch16_cls_224": (224, 112, 256, "", TINY),
    "vitamin_small_224": (224, 112, 256, "avg", VITAMIN),
    "fastvit_mci0": (256, 128, 288, "avg", FASTVIT),
    "convnext_tiny": (224, 96, 256, "avg", CONVNEXT),
}
"""Kinds of image towers: the tower's image size and two others; then fields of its config, or, for timm's towers,
open_clip's pooling and arguments that leave few parameters."""

LARGE = ("vit_base_mci_224", "vitamin_small_224")
SLOW = [pytest.param(kind, marks=pytest.mark.slow if kind in LARGE else ()) for kind in KINDS]


@pytest.fixture
def config(monkeypatch):
    """config(kind) is a model config of a small tower of this kind."""
    create = timm.create_model
    monkeypatch.setattr("timm.create_model", lambda name, **options: create(name, **options, **KINDS[name][-1]))

    def make(kind, **vision):
        if "_" in kind:
            own = {
                "timm_model_name": kind,
                "timm_pool": KINDS[kind][3],
                "timm_proj": "linear",
                "image_size": KINDS[kind][0],
            }
        else:
            own = (RESNET if kind == "resnet" else VIT) | KINDS[kind][-1]
        return small_config(vision_cfg=own | vision, text_cfg={**TEXT, "vocab_size": 100})

    return make


@pytest.fixture
def saved(config, tmp_path):
    """saved(kind) writes a model config and weights of its size; it returns both paths and two other sizes."""

    def save(kind):
        content = config(kind)
        (tmp_path / "model.json").write_text(json.dumps(content))
        torch.manual_seed(0)
        clip = build_model(ModelOptions(vision_model=str(tmp_path / "model.json"), pretrained="none")).clip
        for name, parameter in clip.visual.named_parameters():
            if "pos" in name and parameter.ndim > 1:  # timm's initial values would hide differences
                torch.nn.init.normal_(parameter)
        torch.save(clip.state_dict(), tmp_path / "model.pt")
        return str(tmp_path / "model.json"), str(tmp_path / "model.pt"), *KINDS[kind][1:3]

    return save


def encode(clip, size):
    images = torch.rand(2, 3, *height_and_width(size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return F.normalize(clip.eval().encode_image(images), dim=-1)


def rebuilt(built, image_size=None):
    """The model as a checkpoint of ours gives it back, perhaps at another size."""
    config = json.loads(json.dumps(built.config))
    return rebuild_model(
        config, built.preprocess, built.clip.state_dict(), "x", "last.pt", ModelOptions(image_size=image_size)
    )


@pytest.mark.parametrize("kind", [kind for kind in SLOW if kind.values != ("resnet",)])
def test_features_at_another_size_are_those_of_open_clip(kind, saved, config, monkeypatch):
    name, weights, *sizes = saved(kind)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "model", config(kind))
    for size in [*sizes, tuple(sizes)]:
        expected = open_clip.create_model("model", pretrained=weights, force_image_size=size)
        built = build_model(ModelOptions(vision_model=name, pretrained=weights, image_size=size))
        assert torch.allclose(encode(built.clip, size), encode(expected, size), atol=1e-6)
        assert height_and_width(built.preprocess["size"]) == height_and_width(size)


@pytest.mark.parametrize("kind", SLOW)
def test_finetune_at_another_size_loads_again(kind, saved):
    name, weights, small, large = saved(kind)
    built = build_model(ModelOptions(vision_model=name, pretrained=weights, image_size=(small, large)))
    for size in ((small, large), large, (large, small)):
        built = rebuilt(built, size)
        again = rebuilt(built)
        assert torch.equal(encode(again.clip, size), encode(built.clip, size))
        assert again.preprocess == built.preprocess
        assert height_and_width(again.config["vision_cfg"]["image_size"]) == height_and_width(size)


@pytest.mark.parametrize("kind", ["vit", "resnet", "vit_base_patch16_siglip_224", "swin_base_patch4_window7_224"])
def test_weights_of_another_size_than_the_config_load(kind, saved, tmp_path):
    name, weights, small, large = saved(kind)
    trained = build_model(ModelOptions(vision_model=name, pretrained=weights, image_size=small))
    torch.save(trained.clip.state_dict(), weights)
    for size in [small] if "swin" in kind else [small, large]:  # a third size: their positions tell the second one
        built = build_model(ModelOptions(vision_model=name, pretrained=weights, image_size=size))
        assert torch.equal(encode(built.clip, size), encode(rebuilt(trained, size).clip, size))


@pytest.mark.parametrize("kind", ["vit", "resnet", "eva02_base_patch16_clip_224", "swin_base_patch4_window7_224"])
def test_config_of_height_and_width_takes_weights_of_a_square(kind, saved, config, tmp_path):
    name, weights, small, large = saved(kind)
    square = build_model(ModelOptions(vision_model=name, pretrained=weights))
    (tmp_path / "wide.json").write_text(json.dumps(config(kind, image_size=[small, large])))
    wide = build_model(ModelOptions(vision_model=str(tmp_path / "wide.json"), pretrained=weights))
    assert wide.preprocess["size"] == [small, large]
    assert torch.equal(encode(wide.clip, (small, large)), encode(rebuilt(square, (small, large)).clip, (small, large)))


def test_positions_of_a_resnet_are_interpolated_as_those_of_a_vit():
    visual = small_clip(resnet=True, vision_cfg={**RESNET, "image_size": 96}).visual
    old = visual.attnpool.positional_embedding.detach()
    resize_image_tower(visual, (64, 128))
    new = visual.attnpool.positional_embedding.detach()
    vit = SimpleNamespace(visual=SimpleNamespace(grid_size=(2, 4)))
    open_clip.model.resize_pos_embed(expected := {"visual.positional_embedding": old}, vit)
    assert torch.allclose(new, expected["visual.positional_embedding"])


def test_positions_of_as_many_patches_in_another_shape_are_interpolated():
    visual, clip = (
        small_clip(vision_cfg={**VIT, "image_size": 48}).visual,
        small_clip(vision_cfg={**VIT, "image_size": 48}),
    )
    grid = visual.positional_embedding[1:].detach().reshape(1, 6, 6, -1).permute(0, 3, 1, 2)
    resize_image_tower(visual, (32, 72))
    expected = F.interpolate(grid, size=(4, 9), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(36, -1)
    assert torch.allclose(visual.positional_embedding[1:], expected, atol=1e-6)
    assert encode(clip, 48).shape == (2, 24)


def test_random_positions_of_another_size_are_not_interpolated(saved):
    name, *_, large = saved("vit")
    torch.manual_seed(1)
    built = build_model(ModelOptions(vision_model=name, image_size=large))
    torch.manual_seed(1)
    fresh = small_clip(vision_cfg={**VIT, "image_size": large})
    assert built.clip.visual.positional_embedding.std().item() == pytest.approx(
        fresh.visual.positional_embedding.std().item(), rel=0.1
    )


@pytest.mark.parametrize(
    ("kind", "size", "words"),
    [
        ("vit", 30, "must be a multiple of 8 for .*; give 24 or 32"),
        ("vit", 3, "must be a multiple of 8 for .*; give 8"),
        ("vit", (30, 16), "must be a multiple of 8 for .*; give 24 16 or 32 16"),
        ("resnet", 80, "must be a multiple of 32 for .*; give 64 or 96"),
        ("eva_giant_patch14_224", 225, "must be a multiple of 14 for .*; give 224 or 238"),
        ("swin_base_patch4_window7_224", 225, "must be a multiple of 4 for .*; give 224 or 228"),
        ("vitamin_small_224", 225, "must be a multiple of 16 for .*; give 224 or 240"),
        ("convnext_tiny", 31, "must be at least 32 for .*; give a larger one"),
        ("swin_base_patch4_window7_224", 2048, r"does not fit .*\(more than 8,192 patches\); give another size"),
        ("vit", 1024, "vision_cfg divides an image into more than 8,192 patches; give another size"),
    ],
)
def test_size_that_a_tower_cannot_have_is_refused_in_one_line(kind, size, words, saved):
    name, weights, *_ = saved(kind)
    with pytest.raises(UserError, match=rf"^--image_size [\d ]+: {words}[^\n]*$"):
        build_model(ModelOptions(vision_model=name, pretrained=weights, image_size=size))


@pytest.mark.slow
@pytest.mark.full
def test_every_config_takes_other_sizes(monkeypatch):
    create = timm.create_model

    def create_shallow(name, **options):
        fewer = {"convnext": {"depths": (1,) * 4}, "swin": {"depths": (2,) * 4}}
        fewer |= {"fastvit": {"layers": (1,) * (5 if name[-1] in "34" else 4)}}
        return create(name, **options, **fewer.get(name.split("_")[0], {"depth": 2}))

    def check(source):
        with torch.device("meta"):
            built = _build(source, None, None, None, logit_bias=False)
            unit = patch_size(built.clip.visual)[0]
            unit *= max(16 // unit, 1)
            size = height_and_width(source.config["vision_cfg"].get("image_size", 224))[0] // unit * unit
            for each in ((size - unit, size + unit), None, size + unit):
                built = rebuilt(built, each)
            assert _shape(built) == (1, source.config["embed_dim"])

    monkeypatch.setattr("timm.create_model", create_shallow)
    for name in ("normal_", "trunc_normal_", "kaiming_normal_"):
        monkeypatch.setattr(f"torch.nn.init.{name}", lambda tensor, *values, **options: tensor)
    seen = set()
    for name in [*open_clip.list_models(), *names.our_configs()]:
        source = find_source(ModelOptions(vision_model=name, pretrained="none"), True)
        vision = source.config["vision_cfg"]
        for key, fewer in (("layers", 2), ("output_tokens", False)):
            if isinstance(vision.get(key), int):
                vision[key] = fewer
        if "torchvision_model_name" in vision or json.dumps(vision) in seen:
            continue
        seen.add(json.dumps(vision))
        source.config |= {"text_cfg": {**TEXT, "vocab_size": 100}}
        source.config.pop("multimodal_cfg", None)
        try:
            check(source)
        except UserError as error:
            pytest.fail(f"{name}: {error}")


def _shape(built: BuiltModel):
    """Run the image tower on the meta device, which computes only shapes."""
    visual = RetrievalModel(built.clip, built.preprocess).clip.visual
    output = visual(torch.zeros(1, 3, *height_and_width(built.preprocess["size"]), device="meta"))
    return tuple((output[0] if isinstance(output, tuple) else output).shape)
