"""bf16 training: a bf16 copy computes features and gradients, the optimizer updates float32 master weights."""

import copy

import pytest
import torch
import torch.nn.functional as F

from clip_retrieval.losses.infonce import infonce
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.models.trainable import set_trainable
from clip_retrieval.options import LossOptions, TrainOptions
from clip_retrieval.training.trainer import Trainer
from tests.models.small import small_clip, small_preprocess
from tests.training.test_trainer import batch, make_trainer

LEARNING_RATE = 1e-3


def weights_of(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.weights().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_gradients_are_those_of_a_bf16_model():
    trainer = make_trainer(precision="bf16")
    trainer._update = lambda: None
    low, pairs = copy.deepcopy(trainer.model.clip).bfloat16(), batch()
    trainer.step(pairs, 1, LEARNING_RATE)

    pixels = ((pairs.images / 255 - trainer.model.mean) / trainer.model.std).bfloat16()
    scale = trainer.model.clip.logit_scale.detach().exp()
    images = F.normalize(low.visual(pixels).float(), dim=-1)
    texts = F.normalize(encode_bf16(low, pairs.texts).float(), dim=-1)
    infonce(images, texts, pairs.positives, scale).backward()
    for (name, master), parameter in zip(trainer.model.clip.named_parameters(), low.parameters(), strict=True):
        if name != "logit_scale":  # the order of sums in bf16 differs
            expected = parameter.grad.float()
            torch.testing.assert_close(master.grad, expected, rtol=0, atol=0.02 * expected.abs().max().item(), msg=name)


def test_optimizer_updates_the_float32_weights():
    trainer, other = make_trainer(precision="bf16"), make_trainer(precision="bf16")
    other._update = lambda: None
    trainer.step(batch(), 1, LEARNING_RATE)
    other.step(batch(), 1, LEARNING_RATE)
    other.optimizer.step()
    assert_equal(weights_of(trainer), weights_of(other))
    change = (weights_of(trainer)["text_projection"] - make_trainer().model.weights()["text_projection"]).abs().max()
    assert change == pytest.approx(LEARNING_RATE, rel=0.3)


def encode_bf16(clip, tokens):
    x = clip.token_embedding(tokens) + clip.positional_embedding[: tokens.shape[1]]
    x = clip.transformer(x, attn_mask=clip.attn_mask[: tokens.shape[1], : tokens.shape[1]])
    return clip.ln_final(x)[torch.arange(len(x)), tokens.argmax(1)] @ clip.text_projection


@pytest.mark.parametrize("resnet", [False, True])
def test_gradients_of_chunks_are_added_in_float32(resnet):
    gradients = {}
    for name, options in {"whole": {}, "chunks": {"grad_cache": 2}}.items():
        trainer = make_trainer(precision="bf16", resnet=resnet, **options)
        trainer._update = lambda: None
        trainer.step(batch(size=32 if resnet else 16), 1, LEARNING_RATE)
        gradients[name] = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        assert all(gradient.dtype == torch.float32 for gradient in gradients[name].values())
        assert all(p.grad is None for p in trainer.towers.clip.transformer.parameters())
    assert gradients["whole"].keys() == gradients["chunks"].keys() and len(gradients["whole"]) > 30
    weight = gradients["chunks"]["clip.text_projection"]
    assert not torch.equal(weight, weight.bfloat16().float())
    if not resnet:  # batch statistics are those of a chunk
        for name, gradient in gradients["whole"].items():
            atol = 0.03 * gradient.abs().max().item()
            torch.testing.assert_close(gradients["chunks"][name], gradient, rtol=0, atol=atol, msg=name)


def test_batch_statistics_stay_float32_and_are_those_of_the_master():
    trainer = make_trainer(precision="bf16", resnet=True)
    before = weights_of(trainer)
    trainer.step(batch(size=32), 1, LEARNING_RATE)
    norm, low = trainer.model.clip.visual.bn1, trainer.towers.clip.visual.bn1
    assert {t.dtype for t in norm.state_dict().values()} == {torch.float32, torch.int64}
    assert norm.num_batches_tracked == 1
    assert not torch.equal(norm.running_mean, before["visual.bn1.running_mean"])
    assert norm.running_mean.data_ptr() == low.running_mean.data_ptr()
    assert trainer.towers.clip.visual.conv1.weight.dtype == torch.bfloat16


def test_scale_and_bias_are_trained_in_float32():
    trainer = make_trainer(loss="siglip", precision="bf16")
    clip = trainer.model.clip
    before = clip.logit_scale.item(), clip.logit_bias.item()
    trainer.step(batch(), 1, 1e-5)  # below the resolution of bf16
    assert 0 < abs(clip.logit_scale.item() - before[0]) < 1e-4
    assert 0 < abs(clip.logit_bias.item() - before[1]) < 1e-4


def test_resumed_run_is_bit_identical():
    pairs = [batch(seed=seed) for seed in range(4)]
    whole, first, second = (make_trainer(precision="bf16") for _ in range(3))
    for step, each in enumerate(pairs, 1):
        whole.step(each, step, LEARNING_RATE)
    for step in (1, 2):
        first.step(pairs[step - 1], step, LEARNING_RATE)
    second.model.load_weights(weights_of(first))
    second.load_optimizer(first.optimizer.state_dict(), {})
    for step in (3, 4):
        second.step(pairs[step - 1], step, LEARNING_RATE)
    assert_equal(weights_of(second), weights_of(whole))


def test_copy_follows_the_mode_of_the_model():
    trainer = make_trainer(precision="bf16")
    for mode in (True, False, False, True):
        trainer.model.train(mode)
        trainer.step(batch(), 1, LEARNING_RATE)
        assert {module.training for module in trainer.towers.modules()} == {mode}


@pytest.mark.parametrize("resnet", [False, True])
def test_weights_and_gradients_can_be_cast_in_one_kernel(resnet):
    # torch._foreach_copy_ needs equal sizes and strides, and dtypes that are equal within each list
    clip = small_clip(resnet=resnet)
    clip.visual.to(memory_format=torch.channels_last)
    model = RetrievalModel(clip, small_preprocess())
    set_trainable(model)
    trainer = Trainer(model.train(), LossOptions(), TrainOptions(), precision="bf16", device=torch.device("cpu"))
    collected = []
    trainer._masters.collect_gradients = lambda: collected.extend(copied.grad for copied in trainer._masters._copies)
    trainer._update = lambda: None
    trainer.step(batch(size=32 if resnet else 16), 1, LEARNING_RATE)
    masters, copies = trainer._masters._masters, trainer._masters._copies
    assert len(copies) > 20 and {copied.dtype for copied in copies} == {torch.bfloat16}
    for master, copied, gradient in zip(masters, copies, collected, strict=True):
        assert master.shape == copied.shape and master.stride() == copied.stride() == gradient.stride()


@pytest.mark.parametrize("freeze", [{}, {"freeze_vision": True}, {"freeze_text": True}], ids=str)
def test_copy_trains_what_the_model_trains(freeze):
    clip = small_clip(resnet=True).eval()  # as it is built
    model = RetrievalModel(clip, small_preprocess())
    set_trainable(model, **freeze)
    trainer = Trainer(model, LossOptions(), TrainOptions(), precision="bf16", device=torch.device("cpu"))
    model.train()
    trainer.step(batch(size=32), 1, LEARNING_RATE)
    modes = [[module.training for module in each.modules()] for each in (trainer.towers, model)]
    assert modes[0] == modes[1] and any(modes[0])
    assert all(modes[0]) == (not freeze)


@pytest.mark.parametrize("resnet", [False, True])
def test_fifty_steps_stay_as_close_to_float32_as_those_of_autocast(resnet):
    pairs = [batch(pairs=16, seed=seed, size=32 if resnet else 16) for seed in range(5)]
    losses, ends = {}, {}
    for name in ("fp32", "bf16", "autocast"):
        trainer = make_trainer(precision="bf16" if name == "bf16" else "fp32", resnet=resnet)
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
            losses[name] = torch.stack([trainer.step(pairs[n % 5], n + 1, 3e-4).loss.detach() for n in range(50)])
        ends[name] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert losses["fp32"][-1] < 0.5 * losses["fp32"][0]

    def distance(values, name):
        return (values[name] - values["fp32"]).norm().item()

    assert 0 < distance(losses, "bf16") < 1.5 * distance(losses, "autocast")
    assert 0 < distance(ends, "bf16") < 1.5 * distance(ends, "autocast")
