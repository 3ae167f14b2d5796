import pytest
import torch

from clip_retrieval.data.batches.loader import TrainBatch
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.models.trainable import set_trainable, text_is_frozen, vision_is_frozen
from clip_retrieval.options import LossOptions, TrainOptions
from clip_retrieval.training.trainer import Trainer
from tests.models.small import small_clip, small_preprocess, small_simple_clip

CPU = torch.device("cpu")
KINDS = ("vit", "resnet", "simple-clip")


def changed_by_steps(model, size, steps=2, loss="infonce", **options):
    """Return the names in the state dict that training steps change."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_options = TrainOptions(lr=1e-2, **options)
    trainer = Trainer(model, LossOptions(loss=loss), train_options, precision="fp32", device=CPU)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 49000, (6, 8), generator=generator)
    model.train()
    for step in range(steps):
        trainer.step(TrainBatch(images, tokens, torch.eye(6).nonzero()), step + 1, 1e-2)
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def model_of(kind, adaptor=False):
    size = 16 if kind == "vit" else 32
    clip = small_simple_clip(vocabulary=49000) if kind == "simple-clip" else small_clip(resnet=kind == "resnet")
    return RetrievalModel(clip, small_preprocess(size), adaptor=adaptor), size


@pytest.mark.parametrize("kind", KINDS)
def test_all_parameters_are_trainable(kind):
    model, size = model_of(kind)
    set_trainable(model)
    changed = changed_by_steps(model, size)
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters <= changed


PROJECTIONS = {
    "vit": {"clip.visual.proj", "clip.text_projection"},
    "resnet": {"clip.visual.attnpool.c_proj.weight", "clip.visual.attnpool.c_proj.bias", "clip.text_projection"},
    "simple-clip": {f"clip.{tower}.{layer}.weight" for tower in ("visual.head", "text.proj") for layer in (0, 2)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_linear_projection_changes_only_projections_and_scale(kind):
    model, size = model_of(kind)
    set_trainable(model, "linear_projection")
    assert changed_by_steps(model, size) == PROJECTIONS[kind] | {"clip.logit_scale"}


@pytest.mark.parametrize("kind", KINDS)
def test_adaptor_changes_only_the_adaptor_and_the_scale(kind):
    model, size = model_of(kind, adaptor=True)
    set_trainable(model, "adaptor")
    assert changed_by_steps(model, size) == {"adaptor.0.weight", "adaptor.2.weight", "clip.logit_scale"}


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_tower_does_not_change(kind):
    model, size = model_of(kind)
    set_trainable(model, freeze_vision=True)
    assert not any("visual." in name for name in changed_by_steps(model, size))
    model, size = model_of(kind)
    set_trainable(model, freeze_text=True)
    changed = changed_by_steps(model, size)
    assert all("visual." in name or "logit_scale" in name for name in changed)
    assert "clip.logit_scale" in changed


def test_frozen_parts_run_in_evaluation_mode_and_build_no_graph():
    model, _ = model_of("resnet")
    set_trainable(model, freeze_vision=True)
    model.train()
    assert model.clip.transformer.training
    assert not any(module.training for module in model.clip.visual.modules())
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert not model.encode_image(images).requires_grad
    set_trainable(model)
    model.train()
    assert model.clip.visual.bn1.training and model.encode_image(images).requires_grad


def test_only_siglip_learns_a_bias():
    model = RetrievalModel(small_clip(init_logit_bias=-10.0), small_preprocess())
    for learn_bias in (False, True):
        set_trainable(model, learn_bias=learn_bias)
        assert model.clip.logit_bias.requires_grad == learn_bias


def test_loss_without_temperature_does_not_change_the_scale():
    model, size = model_of("vit")
    set_trainable(model, learn_scale=False)
    changed = changed_by_steps(model, size, loss="margin")
    assert "clip.logit_scale" not in changed and "clip.visual.proj" in changed


@pytest.mark.parametrize("kind", KINDS)
def test_bitfit_changes_only_biases_and_the_scale(kind):
    model, size = model_of(kind)
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):  # zero in a new ResNet, so its blocks would have no gradient
            torch.nn.init.ones_(parameter)
    set_trainable(model, "bitfit")
    changed = changed_by_steps(model, size)
    biases = {name for name, p in model.named_parameters() if name.endswith("bias")}
    # adding the same to all keys of a query changes nothing
    keys = {name for name in biases if "k_lin" in name or "attnpool.k_proj" in name}
    assert biases - keys <= changed - {"clip.logit_scale"} <= biases
    if kind == "vit":
        assert {"clip.visual.ln_pre.bias", "clip.transformer.resblocks.0.attn.in_proj_bias"} <= changed


def unlocked(blocks):
    return {"unlocked_image_blocks": blocks, "unlocked_text_blocks": blocks}


@pytest.mark.parametrize("blocks", [0, 1, 2, 9])
def test_only_the_last_blocks_of_both_towers_change(blocks):
    model, size = model_of("vit")
    set_trainable(model, **unlocked(blocks))
    changed = changed_by_steps(model, size)
    groups = ("ln_post", "clip.visual.proj", "ln_final", "text_projection", "logit_scale")
    groups += tuple(f"resblocks.{2 - number}." for number in range(1, min(blocks, 2) + 1))
    parameters = {name for name, _ in model.named_parameters()}
    expected = parameters if blocks > 2 else {name for name in parameters if any(group in name for group in groups)}
    assert changed == expected


def test_locked_blocks_build_no_graph_and_run_in_evaluation_mode():
    model, _ = model_of("simple-clip")
    set_trainable(model, **unlocked(1))
    model.train()
    trunk, text = model.clip.visual.trunk, model.clip.text.transformer
    seen = {}
    for layer in ("layer3", "layer4"):
        getattr(trunk, layer).register_forward_hook(lambda _, __, out, layer=layer: seen.update({layer: out}))
    model.encode_image(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert not seen["layer3"].requires_grad and seen["layer4"].requires_grad
    assert not trunk.layer3[0].bn1.training and trunk.layer4[0].bn1.training
    first, last = text.transformer.layer
    assert not any(module.training for module in (*first.modules(), *text.embeddings.modules()))
    assert last.attention.training


@pytest.mark.parametrize("kind", KINDS)
def test_tower_with_all_blocks_locked_is_not_encoded_once(kind):
    model, _ = model_of(kind)
    set_trainable(model, **unlocked(0))
    assert not vision_is_frozen(model) and not text_is_frozen(model)
    set_trainable(model, "linear_projection")
    assert vision_is_frozen(model) and text_is_frozen(model)


def test_frozen_batch_norms_keep_their_statistics():
    for options in ({"trainable": "lora"}, {"trainable": "bitfit"}, unlocked(1)):
        model, size = model_of("resnet")
        set_trainable(model, **options)
        changed = changed_by_steps(model, size)
        statistics = {name for name in changed if "running" in name or "num_batches" in name}
        assert all("layer4" in name for name in statistics) and bool(statistics) == ("trainable" not in options)
