"""The layers that replace a model's own compute the same, and keep its names and weights."""

import copy

import pytest
import timm
import torch
from torch import nn

from clip_retrieval.models.fast_layers import PatchEmbedding, SelfAttention, speed_up
from tests.models.small import TEXT, VIT, small_clip


def outcome(module, *args, **kwargs):
    """Return the output, and the gradients of inputs and parameters for a loss that weights all outputs differently."""
    module.zero_grad()
    inputs = [arg.detach().clone().requires_grad_() for arg in args]
    output = module(*inputs, **kwargs)
    output = output[0] if isinstance(output, tuple) else output
    output.mul(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    return output.detach(), [each.grad for each in inputs], gradients


def assert_equal_up_to_rounding(module, fast, *args, **kwargs):
    expected, found = outcome(module, *args, **kwargs), outcome(fast, *args, **kwargs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(16, 16), (19, 25)])
@pytest.mark.parametrize("patch, bias", [(4, False), ((8, 4), True)])
def test_patch_embedding_equals_the_convolution(size, patch, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, patch, patch, bias=bias).double()
    fast = copy.deepcopy(conv)
    speed_up(fast)
    assert type(fast) is PatchEmbedding
    assert_equal_up_to_rounding(conv, fast, torch.randn(3, 3, *size, dtype=torch.float64))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 6, 4, 2),
        nn.Conv2d(3, 6, 4, 4, padding=1),
        nn.Conv2d(3, 6, 4, 4, dilation=2),
        nn.Conv2d(3, 6, 4, 4, groups=3),
        nn.Conv2d(6, 6, 4, 4),
    ],
)
def test_other_convolutions_stay(conv):
    speed_up(conv)
    assert type(conv) is nn.Conv2d


def masks():
    causal = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)
    return {"none": None, "causal": causal, "of each head": causal.expand(6, 5, 5) + torch.eye(5, dtype=torch.float64)}


@pytest.mark.parametrize("mask", masks())
def test_self_attention_equals_torch(mask):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    nn.init.normal_(attention.in_proj_bias)
    fast = copy.deepcopy(attention)
    speed_up(fast)
    assert type(fast) is SelfAttention
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    settings = {"need_weights": False, "attn_mask": masks()[mask]}
    assert_equal_up_to_rounding(Same(attention), Same(fast), x, **settings)


class Same(nn.Module):
    """Attention of one input with itself."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, **settings):
        return self.attention(x, x, x, **settings)


def test_other_attention_is_torch_s():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    fast = copy.deepcopy(attention)
    speed_up(fast)
    x, y = torch.randn(3, 5, 8, dtype=torch.float64), torch.randn(3, 4, 8, dtype=torch.float64)
    padding = torch.tensor([[False] * 4, [False] * 3 + [True], [False, True, True, True]])
    for arguments in (
        {"query": x, "key": y, "value": y, "need_weights": False},
        {"query": y, "key": y, "value": y, "key_padding_mask": padding, "need_weights": False},
        {"query": x, "key": x, "value": x},
        {"query": x, "key": x, "value": x, "need_weights": False, "attn_mask": torch.ones(5, 5).triu(1).bool()},
    ):
        torch.testing.assert_close(fast(**arguments), attention(**arguments))


def test_layers_that_attend_across_the_batch_stay():
    attention = nn.MultiheadAttention(8, 2)
    speed_up(attention)
    assert type(attention) is nn.MultiheadAttention


@pytest.mark.parametrize(
    "make",
    [
        lambda: small_clip(custom_text=True, text_cfg=TEXT | {"no_causal_mask": True, "pool_type": "last"}),
        lambda: small_clip(custom_text=True, vision_cfg=VIT | {"pool_type": "avg"}),
        lambda: timm.create_model("vit_tiny_patch16_224", num_classes=0),
    ],
)
def test_models_keep_features_names_and_weights(make):
    torch.manual_seed(0)
    model = make().double().eval()
    fast = copy.deepcopy(model)
    speed_up(fast)
    attentions = sum(type(module) is nn.MultiheadAttention for module in model.modules())  # none in open_clip 4
    assert sum(type(module) is SelfAttention for module in fast.modules()) == attentions
    assert sum(type(module) is PatchEmbedding for module in fast.modules()) == 1
    assert list(fast.state_dict()) == list(model.state_dict())
    size = 16 if hasattr(model, "visual") else 224
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        if hasattr(model, "visual"):
            texts = torch.randint(1, 400, (3, 16))
            torch.testing.assert_close(fast.encode_text(texts), model.encode_text(texts))
            torch.testing.assert_close(fast.encode_image(images), model.encode_image(images))
        else:
            torch.testing.assert_close(fast(images), model(images))
