import copy

import pytest
import torch
import torch.nn.functional as F

from clip_retrieval.errors import UserError
from clip_retrieval.models.lora import LoraSettings, find_lora, merge_lora, merge_state
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.models.trainable import set_trainable
from clip_retrieval.options import LossOptions, TrainOptions
from clip_retrieval.training.trainer import Trainer
from tests.models.small import small_clip, small_preprocess, small_towers, token_ids
from tests.training.test_trainer import batch

ATTENTION_KINDS = ("vit", "custom text", "hugging face", "simple-clip", "siglip", "eva", "resnet")
CPU = torch.device("cpu")


def lora_model(kind="vit", targets="all", rank=3, alpha=6.0, dropout=0.0, freeze_vision=False, **options):
    clip, size = small_towers(kind)
    model = RetrievalModel(clip, small_preprocess(size))
    freeze_vision = freeze_vision or kind == "simple-clip"  # its image tower, a ResNet, has no such layers
    settings = LoraSettings(rank, alpha, dropout, targets)
    set_trainable(model, "lora", lora=settings, freeze_vision=freeze_vision, **options)
    return model.eval(), size


def randomize(model):
    """Give each B random values, as training does."""
    generator = torch.Generator().manual_seed(7)
    for each in find_lora(model):
        each.low_rank.B.data.normal_(std=0.3, generator=generator)


@torch.no_grad()
def features(model, size):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=generator)
    lengths = torch.tensor([3, 7, 12, 16])
    return (model.encode_image(images), model.encode_text(token_ids(lengths.tolist()), lengths))


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_first_features_are_those_of_the_base(kind):
    base, _ = small_towers(kind)
    model, size = lora_model(kind)
    base = RetrievalModel(base, small_preprocess(size)).eval()
    base.load_weights(model.weights())
    for found, expected in zip(features(model, size), features(base, size), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_merged_features_equal_the_unmerged(kind):
    model, size = lora_model(kind)
    first = features(model, size)
    randomize(model)
    unmerged = features(model, size)
    plain = RetrievalModel(small_towers(kind)[0], small_preprocess(size)).eval()
    plain.load_weights(model.weights())
    merge_lora(model.clip)
    assert not find_lora(model)
    for merged, loaded, expected in zip(features(model, size), features(plain, size), unmerged, strict=True):
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-6)
    changed = [bool((a - b).abs().max() > 1e-3) for a, b in zip(first, unmerged, strict=True)]
    assert changed == [kind != "simple-clip", True]


@pytest.mark.parametrize("kind", ["vit", "hugging face", "siglip", "resnet"])
def test_state_dict_keeps_the_names_of_the_base(kind):
    model, _ = lora_model(kind)
    assert model.weights().keys() == small_towers(kind)[0].state_dict().keys()


# Of a ViT and a text tower with 2 blocks of width 32: rank * (inputs + outputs) for each q, k, v and output projection,
# and for both layers of the MLP.
COUNTS = {"attention": 2 * 2 * 4 * (32 + 32), "mlp": 2 * 2 * 2 * (32 + 128)}


@pytest.mark.parametrize("targets", ["attention", "mlp", "all"])
def test_number_of_trainable_parameters_is_that_of_the_formula(targets):
    model, _ = lora_model(targets=targets, rank=3)
    expected = 3 * (COUNTS["attention"] + COUNTS["mlp"] if targets == "all" else COUNTS[targets])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected + 1  # the logit scale


def test_attention_and_mlp_of_a_bert_tower():
    model, _ = lora_model("hugging face", "attention", freeze_vision=True)
    layer = "clip.text.transformer.encoder.layer.0"
    names = {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"}
    assert {each.key for each in find_lora(model)} == {f"{layer}.{name}.weight" for name in names}
    model, _ = lora_model("hugging face", "mlp", freeze_vision=True)
    names = {"intermediate.dense", "output.dense"}
    assert {each.key for each in find_lora(model)} == {f"{layer}.{name}.weight" for name in names}


def test_fused_weights_have_a_low_rank_for_each_of_q_k_and_v():
    for kind, name in (("vit", "in_proj_weight"), ("siglip", "qkv.weight")):
        model, _ = lora_model(kind, "attention")
        fused = [each.low_rank for each in find_lora(model) if "visual" in each.key and each.key.endswith(name)]
        assert fused and all(len(low_rank.A) == len(low_rank.B) == 3 for low_rank in fused)


def test_resnet_adapts_its_attention_pooling_only():
    model, _ = lora_model("resnet")
    image = {each.key for each in find_lora(model) if "visual" in each.key}
    assert image == {f"clip.visual.attnpool.{name}_proj.weight" for name in "qkv"}


def test_tower_without_linear_layers_is_refused_with_a_remedy():
    model = RetrievalModel(small_towers("simple-clip")[0], small_preprocess(32))
    with pytest.raises(UserError, match=r"the image tower has no such linear layers.*--freeze_vision"):
        set_trainable(model, "lora")


def test_rank_above_the_width_is_refused():
    model = RetrievalModel(small_towers("open_clip")[0], small_preprocess())
    with pytest.raises(UserError, match="--lora_rank 33: must be at most 32"):
        set_trainable(model, "lora", lora=LoraSettings(rank=33))


def test_lora_in_the_last_blocks_only():
    model, _ = lora_model(targets="mlp", unlocked_image_blocks=1)
    names = {f"clip.visual.transformer.resblocks.1.mlp.{layer}.weight" for layer in ("c_fc", "c_proj")}
    assert {each.key for each in find_lora(model) if "visual" in each.key} == names


def test_gradients_equal_those_of_the_explicit_low_rank_product():
    """The reference computes x W^T + scale (x A^T) B^T for q, k and v of one attention layer, in float64."""
    torch.manual_seed(0)
    clip = small_clip().double()
    model = RetrievalModel(clip, small_preprocess())
    set_trainable(model, "lora", lora=LoraSettings(rank=3, alpha=6.0))
    randomize(model)
    attention = clip.visual.transformer.resblocks[0].attn
    weight, low_rank = next((each.weight, each.low_rank) for each in find_lora(clip) if each.module is attention)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    out, _ = attention(x, x, x, need_weights=False)
    target = torch.randn_like(out)
    found = torch.autograd.grad((out * target).sum(), [low_rank.A, low_rank.B])

    a, b = (tensor.detach().clone().requires_grad_() for tensor in (low_rank.A, low_rank.B))
    q, k, v = (
        F.linear(x, weight[32 * i : 32 * (i + 1)], attention.in_proj_bias[32 * i : 32 * (i + 1)])
        + 6.0 / 3 * (x @ a[i].T) @ b[i].T
        for i in range(3)
    )
    q, k, v = (tensor.unflatten(2, (2, 16)).transpose(1, 2) for tensor in (q, k, v))
    attended = ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).flatten(2)
    expected = torch.autograd.grad((attention.out_proj(attended) * target).sum(), [a, b])
    for ours, reference in zip(found, expected, strict=True):
        assert reference.abs().max() > 1e-3
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


def test_only_low_rank_weights_and_the_scale_change():
    model, _ = lora_model()
    before = copy.deepcopy(model.state_dict())
    make_steps(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith((".A", ".B", "logit_scale")) for name in changed)


def make_steps(model, steps=2, precision="fp32", **options):
    trainer = Trainer(model.train(), LossOptions(), TrainOptions(**options), precision=precision, device=CPU)
    for step in range(steps):
        trainer.step(batch(), step + 1, 1e-2)
    return trainer


def test_bf16_computes_with_the_merged_weights_rounded_once():
    model, _ = lora_model()
    trainer = make_steps(model, precision="bf16")
    merged, low = merge_state(model.clip), trainer.towers
    adapted = find_lora(low)
    assert adapted
    for each in adapted:
        assert torch.equal(getattr(each.module, each.name), merged[each.key.removeprefix("clip.")].bfloat16())
    for each, own in zip(adapted, find_lora(model), strict=True):
        assert each.low_rank.B is own.low_rank.B and each.low_rank.B.abs().max() > 0


def test_chunks_have_the_gradients_of_the_whole_batch():
    gradients = []
    for options in ({}, {"grad_cache": 3}):
        model, _ = lora_model()
        randomize(model)
        trainer = Trainer(model.train(), LossOptions(), TrainOptions(**options), precision="fp32", device=CPU)
        trainer._update = lambda: None
        trainer.step(batch(), 1, 1e-3)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, rtol=1e-4, atol=1e-6 * whole.abs().max().item(), msg=name)


def test_dropout_drops_inputs_of_the_additions_in_training_only():
    model, size = lora_model(dropout=0.5)
    randomize(model)
    plain, _ = lora_model()
    randomize(plain)
    for found, expected in zip(features(model, size), features(plain, size), strict=True):
        assert torch.equal(found, expected)
    each = find_lora(model.train())[0]
    torch.manual_seed(0)
    delta = (getattr(each.module, each.name) - each.weight).detach()[:32]
    whole = each.low_rank.scale * each.low_rank.B[0] @ each.low_rank.A[0]
    dropped = delta.abs().amax(0) < 1e-7
    assert 0 < dropped.sum() < 32
    torch.testing.assert_close(delta[:, ~dropped], 2 * whole.detach()[:, ~dropped], rtol=1e-4, atol=1e-6)
    assert torch.equal(merge_state(model.clip)["visual.proj"], model.clip.visual.proj)
    torch.testing.assert_close(model.weights()[each.key.removeprefix("clip.")][:32] - each.weight[:32], whole)
