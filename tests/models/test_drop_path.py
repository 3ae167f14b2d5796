"""Stochastic depth and patch dropout: exact in training, and without effect in evaluation."""

import pytest
import torch
import torch.nn.functional as F

from clip_retrieval.device import DTYPES
from clip_retrieval.errors import UserError
from clip_retrieval.models.drop_path import DropPathBlock, set_drop_path
from clip_retrieval.models.patch_dropout import set_patch_dropout
from clip_retrieval.models.towers import RetrievalModel
from tests.models.small import TEXT, VIT, small_clip, small_preprocess, small_towers, token_ids

LENGTHS = torch.tensor([4, 16, 3, 9])
FACTORS = torch.tensor([0, 1, 2, 0.5], dtype=torch.float64)  # of the branches of each of the four items


def model_of(**changes):
    return RetrievalModel(small_clip(**changes).double(), small_preprocess()).double().train()


def inputs(size=16):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=generator)
    return images, token_ids(LENGTHS.tolist())


def run_blocks(blocks, x, factor, mask=None):
    """open_clip's blocks of one item, with its factor on the branches of all blocks but the first."""
    for number, block in enumerate(blocks):
        own = factor if number else 1.0
        x = x + own * block.ls_1(block.attention(block.ln_1(x), attn_mask=mask))
        x = x + own * block.ls_2(block.mlp(block.ln_2(x)))
    return x


@torch.no_grad()
def encode_one_by_one(clip, pixels, ids):
    """The features by open_clip's modules, of each item by itself."""
    visual, images, texts = clip.visual, [], []
    for row, factor in enumerate(FACTORS.tolist()):
        x = run_blocks(visual.transformer.resblocks, visual._embeds(pixels[row, None]), factor)
        images.append(visual.ln_post(x[:, 0]) @ visual.proj)
        x = clip.token_embedding(ids[row, None]) + clip.positional_embedding
        x = run_blocks(clip.transformer.resblocks, x, factor, clip.attn_mask)
        texts.append(clip.ln_final(x)[:, LENGTHS[row] - 1] @ clip.text_projection)
    return F.normalize(torch.cat(images), dim=-1), F.normalize(torch.cat(texts), dim=-1)


@pytest.mark.parametrize("shape", ["packed", "padded", "layer scale"])
def test_each_item_skips_its_own_branches(shape, monkeypatch):
    changes = {}
    if shape == "layer scale":
        changes = {"vision_cfg": VIT | {"ls_init_value": 0.5}, "text_cfg": TEXT | {"ls_init_value": 0.5}}
    model = model_of(**changes)
    images, ids = inputs()
    expected = encode_one_by_one(model.clip, (images.double() / 255 - model.mean) / model.std, ids)
    set_drop_path(model.clip, 0.5)
    monkeypatch.setattr(DropPathBlock, "draw_factors", lambda block, like, items: FACTORS.to(like.dtype))
    found = model(images, ids, None if shape == "padded" else LENGTHS)
    if shape == "padded":  # the image tower by open_clip's forward pass, too
        monkeypatch.setattr("clip_retrieval.models.towers.pools_one_image_token", lambda visual: False)
        torch.testing.assert_close(model.encode_image(images).double(), expected[0], rtol=1e-5, atol=1e-6)
    for features, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(features.double(), reference, rtol=1e-5, atol=1e-6)


def test_factors_have_mean_one_and_the_rate():
    model = model_of()
    set_drop_path(model.clip, 0.2)
    factors = model.clip.visual.transformer.resblocks[1].draw_factors(torch.empty(0, dtype=torch.float64), 20_000)
    assert set(factors.unique().tolist()) == {0.0, 1.25}
    assert (factors == 0).double().mean().item() == pytest.approx(0.2, abs=0.01)


def test_rates_rise_linearly_with_depth():
    model = model_of(vision_cfg=VIT | {"layers": 5}, text_cfg=TEXT | {"layers": 3})
    set_drop_path(model.clip, 0.4)
    for transformer, expected in (
        (model.clip.visual.transformer, [0, 0.1, 0.2, 0.3, 0.4]),
        (model.clip.transformer, [0, 0.2, 0.4]),
    ):
        rates = [getattr(block, "drop_path_rate", 0) for block in transformer.resblocks]
        assert rates == pytest.approx(expected)
    assert model.copy_in(DTYPES["bf16"]).clip.visual.transformer.resblocks[4].drop_path_rate == 0.4


@pytest.mark.parametrize("kind", ["timm mlp", "mobileclip-b", "eva"])
def test_timm_towers_drop_paths_in_training_only(kind):
    clip, size = small_towers(kind)
    model = RetrievalModel(clip, small_preprocess(size)).eval()
    images, names = inputs(size)[0], list(clip.state_dict())
    with torch.no_grad():
        before = model.encode_image(images)
        set_drop_path(clip, 0.9)
        assert torch.equal(model.encode_image(images), before) and list(clip.state_dict()) == names
        model.train()
        torch.manual_seed(0)
        dropped = model.encode_image(images)
        torch.manual_seed(0)
        assert torch.equal(model.encode_image(images), dropped) and not torch.allclose(dropped, before)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("change", [set_drop_path, lambda clip, rate: set_patch_dropout(clip.visual, rate)])
def test_evaluation_is_unchanged_and_training_is_a_function_of_the_seed(change, checkpointing):
    model, plain = model_of(), model_of()
    change(model.clip, 0.5)
    model.clip.set_grad_checkpointing(checkpointing)
    images, ids = inputs()
    assert list(model.weights()) == list(plain.weights())
    for found, expected in zip(model.eval()(images, ids, LENGTHS), plain.eval()(images, ids, LENGTHS), strict=True):
        assert torch.equal(found, expected)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model.train()(images, ids, LENGTHS)[0].sum().backward()
        results.append(model.clip.visual.conv1.weight.grad.clone())
        model.zero_grad()
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_patch_dropout_keeps_the_class_token_and_a_share_of_the_patches():
    clip = small_clip(vision_cfg=VIT | {"image_size": 64})  # 64 patches
    set_patch_dropout(clip.visual.train(), 0.75)
    seen = []
    clip.visual.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    clip.visual(torch.randn(2, 3, 64, 64))
    assert seen[0].shape[1] == 1 + 16
    clip.visual.eval()(torch.randn(2, 3, 64, 64))
    assert seen[1].shape[1] == 1 + 64


def test_timm_vit_drops_patches_and_other_towers_are_refused():
    clip, size = small_towers("siglip")
    set_patch_dropout(clip.visual, 0.5)
    shapes = []
    clip.visual.trunk.norm_pre.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape[1]))
    clip.visual.train()(torch.randn(2, 3, size, size))
    clip.visual.eval()(torch.randn(2, 3, size, size))
    assert shapes[0] - clip.visual.trunk.num_prefix_tokens == (shapes[1] - clip.visual.trunk.num_prefix_tokens) // 2
    with pytest.raises(UserError, match=r"--patch_dropout.*ModifiedResNet"):
        set_patch_dropout(small_clip(resnet=True).visual, 0.5)


def test_towers_without_blocks_are_named(caplog):
    set_drop_path(small_clip(resnet=True), 0.1)
    assert "--drop_path has no effect on this model's image tower (ModifiedResNet)" in caplog.text
    with pytest.raises(UserError, match="--drop_path: not for"):
        set_drop_path(small_towers("simple-clip")[0], 0.1)
