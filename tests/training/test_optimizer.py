import open_clip
import pytest
import torch

from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import TrainOptions
from clip_retrieval.training.optimizer import make_optimizer, parameter_groups
from tests.models.small import small_clip, small_preprocess, small_towers


def group_names(model):
    names = {p: n for n, p in model.named_parameters()}
    return [{names[p] for p in group["params"]} for group in parameter_groups(model, 0.2)]


def test_vit_norms_biases_scale_and_embeddings_have_no_decay():
    decayed, exempt = group_names(RetrievalModel(small_clip(), small_preprocess()))
    assert {
        "clip.logit_scale",
        "clip.positional_embedding",
        "clip.visual.class_embedding",
        "clip.visual.positional_embedding",
        "clip.visual.ln_pre.weight",
        "clip.ln_final.weight",
        "clip.transformer.resblocks.0.attn.in_proj_bias",
        "clip.transformer.resblocks.0.ln_1.weight",
    } <= exempt
    assert {
        "clip.visual.proj",
        "clip.text_projection",
        "clip.visual.conv1.weight",
        "clip.token_embedding.weight",
        "clip.transformer.resblocks.0.attn.in_proj_weight",
    } <= decayed


def test_resnet_batch_norms_have_no_decay_under_any_name():
    model = RetrievalModel(small_clip(resnet=True), small_preprocess())
    decayed, exempt = group_names(model)
    assert "clip.visual.bn1.weight" in exempt
    assert "clip.visual.layer1.0.downsample.1.weight" in exempt  # a BatchNorm2d without bn in its name
    assert "clip.visual.layer1.0.downsample.0.weight" in decayed


def test_adamw_has_the_options_and_only_trainable_parameters():
    model = RetrievalModel(small_clip(), small_preprocess())
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name == "clip.visual.proj"
    options = TrainOptions(lr=3e-4, beta1=0.8, beta2=0.95, eps=1e-7, weight_decay=0.05)
    optimizer = make_optimizer(model, options, torch.device("cpu"))
    (group,) = optimizer.param_groups
    assert group["params"] == [model.clip.visual.proj]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-4, (0.8, 0.95), 1e-7, 0.05)


def test_no_weight_decay_list_of_open_clip_is_covered():
    clip = small_clip()
    _, exempt = group_names(RetrievalModel(clip, small_preprocess()))
    assert {f"clip.{name}" for name in open_clip.CLIP.no_weight_decay(clip)} <= exempt


def rates(kind, **options):
    """The learning rate of each parameter."""
    clip, size = small_towers(kind)
    model = RetrievalModel(clip, small_preprocess(size), adaptor=True)
    optimizer = make_optimizer(model, TrainOptions(**options), torch.device("cpu"))
    names = {p: n for n, p in model.named_parameters()}
    found = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == set(names.values())
    return found


# Rates of --lr 1 --layer_decay 0.5.
DECAYED = {
    "vit": {
        "clip.visual.conv1.weight": 0.125,
        "clip.visual.positional_embedding": 0.125,
        "clip.visual.ln_pre.weight": 0.125,
        "clip.visual.transformer.resblocks.0.mlp.c_fc.weight": 0.25,
        "clip.visual.transformer.resblocks.1.mlp.c_fc.bias": 0.5,
        "clip.visual.ln_post.weight": 1,
        "clip.visual.proj": 1,
        "clip.token_embedding.weight": 0.125,
        "clip.transformer.resblocks.0.attn.in_proj_weight": 0.25,
        "clip.transformer.resblocks.1.ln_2.weight": 0.5,
        "clip.ln_final.bias": 1,
        "clip.text_projection": 1,
        "clip.logit_scale": 1,
        "adaptor.0.weight": 1,
    },
    "resnet": {
        "clip.visual.conv2.weight": 1 / 32,
        "clip.visual.layer1.0.conv1.weight": 1 / 16,
        "clip.visual.layer2.0.conv1.weight": 1 / 8,
        "clip.visual.layer3.0.bn1.weight": 1 / 4,
        "clip.visual.layer4.0.conv1.weight": 1 / 2,
        "clip.visual.attnpool.v_proj.weight": 1,
    },
    "hugging face": {
        "clip.text.transformer.embeddings.word_embeddings.weight": 0.25,
        "clip.text.transformer.encoder.layer.0.attention.self.query.weight": 0.5,
        "clip.text.proj.0.weight": 1,
    },
    "siglip": {
        "clip.visual.trunk.patch_embed.proj.weight": 0.5**7,
        "clip.visual.trunk.blocks.0.attn.qkv.weight": 0.5**6,
        "clip.visual.trunk.blocks.4.attn.qkv.weight": 0.5**2,
        "clip.visual.trunk.blocks.5.attn.qkv.weight": 0.5,
        "clip.visual.trunk.attn_pool.q.weight": 1,
    },
}


@pytest.mark.parametrize("kind", DECAYED)
def test_layer_decay_gives_the_rates_of_the_table(kind):
    found = rates(kind, lr=1.0, layer_decay=0.5)
    assert {name: found[name] for name in DECAYED[kind]} == DECAYED[kind]


def test_timm_tower_has_timms_own_rates():
    from timm.optim import param_groups_layer_decay

    clip, _ = small_towers("siglip")  # its trunk ends in an attention pooling, which timm's groups have at rate 1
    trunk = clip.visual.trunk
    groups = param_groups_layer_decay(trunk, layer_decay=0.65)
    expected = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    found = rates("siglip", lr=1.0, layer_decay=0.65)
    for name, parameter in trunk.named_parameters():
        assert found[f"clip.visual.trunk.{name}"] == pytest.approx(expected[id(parameter)]), name


def test_image_text_and_head_have_their_own_rates_times_the_decay():
    found = rates("vit", lr=1e-3, lr_image=2e-3, lr_text=3e-3, lr_head=4e-3, layer_decay=0.5)
    expected = {
        "clip.visual.conv1.weight": 2e-3 / 8,
        "clip.visual.ln_post.weight": 2e-3,
        "clip.visual.proj": 4e-3,
        "clip.token_embedding.weight": 3e-3 / 8,
        "clip.transformer.resblocks.1.ln_1.weight": 3e-3 / 2,
        "clip.text_projection": 4e-3,
        "clip.logit_scale": 4e-3,
        "adaptor.2.weight": 4e-3,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_rate_of_one_part_leaves_the_others():
    found = rates("vit", lr=1e-3, lr_text=1e-4)
    assert {found[name] for name in found if "visual" in name or "logit" in name or "proj" in name} >= {1e-3}
    assert found["clip.ln_final.weight"] == pytest.approx(1e-4) and found["clip.visual.conv1.weight"] == 1e-3


def test_without_own_rates_there_are_two_groups_at_one_rate():
    model = RetrievalModel(small_clip(), small_preprocess())
    groups = make_optimizer(model, TrainOptions(lr=3e-4), torch.device("cpu")).param_groups
    assert [(group["lr"], group["lr_scale"], group["weight_decay"]) for group in groups] == [
        (3e-4, 1.0, 0.2),
        (3e-4, 1.0, 0.0),
    ]
