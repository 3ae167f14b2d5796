"""Pooled tokens have the features and gradients of open_clip's own forward passes."""

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clip_retrieval.data.captions import tokenize
from clip_retrieval.models.pooled import pools_one_image_token, pools_the_end_token
from clip_retrieval.models.projection import text_part
from clip_retrieval.models.towers import RetrievalModel
from tests.models.small import TEXT, VIT, small_clip, small_preprocess, token_ids

LENGTHS = torch.tensor([4, 16, 3, 9, 2])
SHAPES = {
    "plain": {},
    "custom text": {"custom_text": True},
    "quick gelu": {"quick_gelu": True},
    "layer scale": {"vision_cfg": VIT | {"ls_init_value": 0.5}, "text_cfg": TEXT | {"ls_init_value": 0.5}},
    "no first norm": {"vision_cfg": VIT | {"no_ln_pre": True}},
    "last norm after the pooling": {"vision_cfg": VIT | {"final_ln_after_pool": True}},
    "linear projection": {"custom_text": True, "text_cfg": TEXT | {"proj_bias": True}},
}


def model_of(shape):
    return RetrievalModel(small_clip(**SHAPES[shape]).double(), small_preprocess()).double().train()


def inputs():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return images, token_ids(LENGTHS.tolist())


def outcome(model, features):
    """Return features, and the gradient of every parameter for a loss that weights all features differently."""
    weight = torch.linspace(-1, 1, features[0].numel(), dtype=torch.float64).view_as(features[0])
    sum((feature * weight).sum() for feature in features).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return [feature.detach() for feature in features], gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_features_and_gradients_equal_open_clip(shape, checkpointing):
    model = model_of(shape)
    assert pools_one_image_token(model.clip.visual) and pools_the_end_token(text_part(model.clip))
    images, ids = inputs()
    pixels = (images.double() / 255 - model.mean) / model.std
    reference = nn.ModuleDict({"clip": small_clip(**SHAPES[shape]).double().train()})
    clip = reference["clip"]
    plain = [F.normalize(clip.encode_image(pixels), dim=-1), F.normalize(clip.encode_text(ids), dim=-1)]
    expected, expected_gradients = outcome(reference, [feature.float().double() for feature in plain])
    model.clip.set_grad_checkpointing(checkpointing)
    found, gradients = outcome(model, [feature.double() for feature in model(images, ids, LENGTHS)])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys() and len(gradients) > 50
    for name, gradient in gradients.items():
        largest = expected_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-6 * largest + 1e-12, msg=name)


def test_padding_beyond_the_longest_caption_is_not_needed():
    model = model_of("plain")
    _, ids = inputs()
    few = slice(2, None)
    with torch.no_grad():
        short = model.encode_text(ids[few, :9], LENGTHS[few])
        torch.testing.assert_close(short, model.encode_text(ids[few]), rtol=0, atol=1e-6)


SPELLED = ["<end_of_text>", "a <end_of_text> dog", "a dog <end_of_text>", "<start_of_text> <end_of_text> a b c", "a"]
SPELLED += ["a dog " * 20, "<end_of_text> " * 30]


@pytest.mark.parametrize("text", [{}, {"pool_type": "eos", "eos_id": 49407}])
@pytest.mark.parametrize("packed", [True, False])
def test_caption_that_spells_the_end_token_equals_open_clip(packed, text):
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    tokens = tokenize(SPELLED, tokenizer)
    assert torch.equal(tokens.ids.long(), tokenizer(SPELLED))
    clip = open_clip.CustomTextCLIP(24, vision_cfg=VIT, text_cfg=TEXT | text).eval()
    model = RetrievalModel(copy.deepcopy(clip), small_preprocess()).eval()
    assert pools_the_end_token(text_part(model.clip))
    with torch.no_grad():
        found = model.encode_text(tokens.ids.long(), tokens.lengths if packed else None)
        expected = clip.encode_text(tokenizer(SPELLED), normalize=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "vision, text",
    [
        (VIT | {"pool_type": "avg"}, TEXT | {"pool_type": "last"}),
        (VIT | {"attentional_pool": True, "attn_pooler_heads": 2}, TEXT | {"embed_cls": True}),
        (VIT | {"block_type": "custom", "qk_norm": True}, TEXT | {"no_causal_mask": True}),
    ],
)
def test_other_towers_are_not_pooled_here(vision, text):
    clip = open_clip.CustomTextCLIP(24, vision_cfg=vision, text_cfg=text).eval()
    model = RetrievalModel(copy.deepcopy(clip), small_preprocess()).eval()
    assert not pools_one_image_token(clip.visual)
    images, ids = inputs()
    with torch.no_grad():
        found = model(images, ids, LENGTHS)
        pixels = (images / 255 - model.mean) / model.std
        expected = clip.encode_image(pixels, normalize=True), clip.encode_text(ids, normalize=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
