"""A tower that accepts smaller images computes the features of the tower resized to them, with exact gradients."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

from clip_retrieval.errors import UserError
from clip_retrieval.models.any_size import accept_smaller_images, interpolation_matrix
from clip_retrieval.models.drop_path import set_drop_path
from clip_retrieval.models.image_size import height_and_width, resize_image_tower
from clip_retrieval.models.patch_dropout import set_patch_dropout
from clip_retrieval.models.towers import RetrievalModel
from tests.models.small import RESNET, VIT, small_clip, small_preprocess

POSITIONS = ("positional_embedding", "attnpool.positional_embedding", "trunk.pos_embed")
TIMM = {
    "siglip": ("vit_base_patch16_siglip_224", "map", {"embed_dim": 32, "depth": 1, "num_heads": 2}),
    "eva": ("eva02_base_patch16_clip_224", "token", {"embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2}),
    "pe": (
        "vit_pe_core_tiny_patch16_384",
        "map",
        {"embed_dim": 32, "depth": 1, "num_heads": 2, "attn_pool_num_heads": 2},
    ),
    "so400m": ("vit_so400m_patch14_siglip_384", "map", {"embed_dim": 32, "depth": 1, "num_heads": 2}),
    "vitamin": ("vitamin_small_224", "avg", {"depth": 1, "num_heads": 2, "mlp_ratio": 0.5}),
    "mci": ("vit_base_mci_224", "token", {"depth": 1}),
    "convnext": ("convnext_tiny", "avg", {"depths": (1,) * 4, "dims": (8, 16, 24, 32)}),
    "swin": (
        "swin_base_patch4_window7_224",
        "avg",
        {"embed_dim": 16, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
    ),
    "relpos": ("vit_relpos_medium_patch16_cls_224", "", {"embed_dim": 32, "depth": 1, "num_heads": 2}),
}
SIZES = {"vit": (48, 16), "coca": (48, 24), "resnet": (96, 64), "so400m": (384, 112), "pe": (384, 112)}
"""Full and smaller image sizes; (224, 112) for the others."""
LARGE = ("vitamin", "mci")


@pytest.fixture
def make(monkeypatch):
    """make(kind) is a small model with an image tower of this kind, and random position embeddings."""
    create = timm.create_model

    def make(kind):
        full, _ = SIZES.get(kind, (224, 112))
        if kind == "resnet":
            clip = small_clip(resnet=True, vision_cfg={**RESNET, "image_size": full})
        elif kind in ("vit", "coca"):
            pool = {"attentional_pool": True, "attn_pooler_heads": 2} if kind == "coca" else {}
            clip = small_clip(vision_cfg={**VIT, "image_size": full, **pool})
        else:
            name, pool, fewer = TIMM[kind]
            monkeypatch.setattr("timm.create_model", lambda name, **options: create(name, **options, **fewer))
            vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": "linear", "image_size": full}
            clip = small_clip(custom_text=True, vision_cfg=vision)
        with torch.no_grad():
            for name in POSITIONS:
                if (positions := dict(clip.visual.named_parameters()).get(name)) is not None:
                    positions.normal_(generator=torch.Generator().manual_seed(1))
        return RetrievalModel(clip, small_preprocess(full)).eval()

    return make


def photos(*size):
    return torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def encode(model, size):
    with torch.no_grad():
        return model.encode_image(photos(*height_and_width(size)))


KINDS = ["vit", "coca", "resnet", "siglip", "eva", "pe", "so400m", "convnext", "vitamin", "mci"]


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow if k in LARGE else ()) for k in KINDS])
def test_features_of_smaller_images_equal_those_of_the_resized_tower(kind, make):
    model, (full, small) = make(kind), SIZES.get(kind, (224, 112))
    before, resized = encode(model, full), copy.deepcopy(model)
    resize_image_tower(resized.clip.visual, small)
    accept_smaller_images(model.clip.visual, full, small)
    assert torch.allclose(encode(model, small), encode(resized, small), atol=1e-5)
    assert torch.equal(encode(model, full), before)
    assert list(model.state_dict()) == list(resized.state_dict())


@pytest.mark.parametrize("kind", ["vit", "resnet", "siglip", "eva"])
def test_gradients_of_the_positions_equal_those_of_an_interpolation_in_float64(kind, make):
    model, (full, small) = make(kind), SIZES.get(kind, (224, 112))
    resized = copy.deepcopy(model)
    resize_image_tower(resized.clip.visual, small)
    accept_smaller_images(model.clip.visual, full, small)
    weight = torch.linspace(-1, 1, 24)
    for each in (model, resized):
        (each.encode_image(photos(small, small)) * weight).sum().backward()
    # chain rule: through the interpolation of the tower that was resized
    name = next(name for name in POSITIONS if name in dict(model.clip.visual.named_parameters()))
    found, smaller = (dict(each.clip.visual.named_parameters())[name].grad for each in (model, resized))
    found, smaller = found.reshape(-1, found.shape[-1]).double(), smaller.reshape(-1, smaller.shape[-1]).double()
    sides = [round(len(rows) ** 0.5) for rows in (found, smaller)]
    others = len(found) - sides[0] ** 2
    positions = torch.zeros(1, found.shape[-1], sides[0], sides[0], dtype=torch.float64, requires_grad=True)
    resize = F.interpolate(positions, size=(sides[1], sides[1]), mode="bicubic", antialias=True)
    resize.backward(smaller[others:].T.reshape_as(resize))
    expected = torch.cat([smaller[:others], positions.grad[0].flatten(1).T])
    assert expected.norm() > 0
    assert torch.allclose(found, expected, atol=1e-6 * float(expected.abs().max()) + 1e-9, rtol=1e-4)


@pytest.mark.parametrize("grid", [(3, 5), (6, 4), (1, 1)])
def test_interpolation_matrix_equals_the_interpolation_in_float64(grid):
    positions = torch.randn(1, 8, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(positions, size=grid, mode="bicubic", antialias=True)[0].flatten(1).T
    found = interpolation_matrix((6, 9), grid).double() @ positions[0].flatten(1).T
    assert torch.allclose(found, expected, atol=1e-6)


def test_patch_dropout_and_drop_path_see_the_smaller_grid(make):
    model = make("vit")
    set_drop_path(model.clip, 0.3)
    set_patch_dropout(model.clip.visual, 0.5)
    accept_smaller_images(model.clip.visual, 48, 32)
    tokens = []
    model.clip.visual.ln_pre.register_forward_hook(lambda module, inputs, output: tokens.append(output.shape[1]))
    model.train()
    encode(model, 32)
    encode(model, 48)
    assert tokens == [1 + 16 // 2, 1 + 36 // 2]


def test_copy_in_bf16_interpolates_its_own_positions(make):
    model = make("eva")
    accept_smaller_images(model.clip.visual, 224, 112)
    copied = model.copy_in(torch.bfloat16)
    assert torch.allclose(encode(copied, 112), encode(model, 112), atol=0.05)
    with torch.no_grad():
        copied.clip.visual.trunk.pos_embed.zero_()
    assert not torch.allclose(encode(copied, 112), encode(model, 112), atol=0.05)


@pytest.mark.parametrize(
    ("kind", "size", "words"),
    [
        ("vit", 20, r"--start_image_size 20: must be a multiple of 8 for this model; give 16 or 24$"),
        ("resnet", 80, r"--start_image_size 80: must be a multiple of 32 for this model; give 64 or 96$"),
        ("siglip", 100, r"--start_image_size 100: must be a multiple of 16 for this model; give 96 or 112$"),
        ("vit", 48, r"--start_image_size 48: must be below the image size, 48; lower it$"),
        ("vit", (24, 56), r"--start_image_size 24 56: must be below the image size, 48; lower it$"),
        (
            "swin",
            112,
            r"--start_image_size: this model's image tower \(SwinTransformer\) takes one size only .*; drop it$",
        ),
        ("relpos", 112, r".*image tower \(VisionTransformerRelPos\) takes one size only .*; drop it$"),
    ],
)
def test_size_or_tower_that_does_not_fit_is_refused_in_one_line(kind, size, words, make):
    model = make(kind)
    with pytest.raises(UserError, match=words) as error:
        accept_smaller_images(model.clip.visual, model.preprocess["size"], size)
    assert "\n" not in str(error.value)
