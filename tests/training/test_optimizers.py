"""The updates of Lion and Muon equal float64 references."""

import copy

import pytest
import torch

from clip_retrieval.errors import UserError
from clip_retrieval.models.lora import LoraSettings
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.models.trainable import set_trainable
from clip_retrieval.options import TrainOptions
from clip_retrieval.training.muon import hidden_matrices
from clip_retrieval.training.optimizer import make_optimizer
from tests.models.small import small_clip, small_preprocess, small_simple_clip, small_towers

STEPS = 3
NOT_DECAYED = {"positional_embedding", "class_embedding", "logit_scale"}


def steps_of(options, model=None):
    """The weights before and after each of STEPS steps, with their gradients: name, (before, gradient, after)."""
    model = model or RetrievalModel(small_clip(), small_preprocess())
    optimizer = make_optimizer(model, options, torch.device("cpu"))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    history = {name: [] for name in trainable}
    for _ in range(STEPS):
        for name, parameter in trainable.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            history[name].append((parameter.detach().clone(), parameter.grad.clone()))
        optimizer.step()
    return {name: (steps, trainable[name].detach()) for name, steps in history.items()}


def is_decayed(name, weight):
    return weight.ndim >= 2 and name.rsplit(".")[-1] not in NOT_DECAYED


def test_lion_equals_a_float64_loop():
    rate, decay, beta1, beta2 = 1e-3, 0.7, 0.9, 0.99
    found = steps_of(TrainOptions(optimizer="lion", lr=rate, weight_decay=decay))
    for name, (steps, after) in found.items():
        weight, momentum = steps[0][0].double(), 0
        for _, gradient in steps:
            gradient = gradient.double()
            direction = torch.sign(beta1 * momentum + (1 - beta1) * gradient)
            weight = weight - rate * (direction + decay * is_decayed(name, weight) * weight)
            momentum = beta2 * momentum + (1 - beta2) * gradient
        torch.testing.assert_close(after.double(), weight, rtol=0, atol=1e-6, msg=name)


def orthogonalize(matrix):
    """Five Newton-Schulz steps with Jordan's coefficients, in float64."""
    x = matrix if len(matrix) <= len(matrix.T) else matrix.T
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if len(matrix) <= len(matrix.T) else x.T


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_muon_equals_a_float64_loop_over_single_matrices(trainable):
    rate, decay, beta = 1e-2, 0.7, 0.95
    model = RetrievalModel(small_clip(), small_preprocess())
    set_trainable(model, trainable, lora=LoraSettings(rank=4))
    parts = hidden_matrices(model.clip)
    found = steps_of(TrainOptions(optimizer="muon", lr=rate, weight_decay=decay), model)
    assert sum(name.removeprefix("clip.") in parts for name in found) == 16
    for name, (steps, after) in found.items():
        if (number := parts.get(name.removeprefix("clip."))) is None:
            continue
        rows = after.shape[-2] * (after.shape[0] if after.ndim == 3 else 1) // number
        weight, momentum = steps[0][0].double().view(number, rows, -1), 0
        for _, gradient in steps:
            gradient = gradient.double().view(weight.shape)
            momentum = beta * momentum + (1 - beta) * gradient
            nesterov = (1 - beta) * gradient + beta * momentum
            update = torch.stack([orthogonalize(matrix) for matrix in nesterov])
            weight = (1 - rate * decay) * weight - rate * 0.2 * max(weight.shape[1:]) ** 0.5 * update
        # torch computes the iteration in bf16
        error = (after.double().view(weight.shape) - weight).norm() / (weight - steps[0][0].view(weight.shape)).norm()
        assert error < 0.03, name


def test_muon_leaves_all_other_parameters_to_adamw():
    options = {"lr": 1e-3, "layer_decay": 0.5, "lr_head": 1e-2, "eps": 1e-7, "beta1": 0.8}
    model = RetrievalModel(small_clip(), small_preprocess())
    muon = steps_of(TrainOptions(optimizer="muon", **options), copy.deepcopy(model))
    adamw = steps_of(TrainOptions(**options), model)
    matrices = {f"clip.{name}" for name in hidden_matrices(model.clip)}
    for name, (_, after) in muon.items():
        assert torch.equal(after, adamw[name][1]) == (name not in matrices), name


@pytest.mark.parametrize("kind", ["vit", "resnet", "hugging face", "siglip", "simple-clip"])
def test_muon_takes_only_matrices_of_linear_layers(kind):
    clip = small_simple_clip() if kind == "simple-clip" else small_towers(kind)[0]
    parts = hidden_matrices(clip)
    parameters = dict(clip.named_parameters())
    assert parts and all(parameters[name].ndim == 2 for name in parts)
    assert not any(word in name for name in parts for word in ("embed", "logit", "text_projection", "visual.proj"))
    fused = {name for name in parameters if name.endswith(("in_proj_weight", "qkv.weight"))}
    assert {name for name, number in parts.items() if number == 3} == fused


def test_learning_rates_of_muon_follow_layer_decay():
    model = RetrievalModel(small_clip(), small_preprocess())
    groups = make_optimizer(model, TrainOptions(optimizer="muon", lr=1.0, layer_decay=0.5), torch.device("cpu"))
    rates = {name: group["lr"] for group in groups.param_groups if "parts" in group for name in group["names"]}
    assert rates["clip.visual.transformer.resblocks.0.mlp.c_fc.weight"] == 0.25
    assert rates["clip.visual.transformer.resblocks.1.attn.in_proj_weight"] == 0.5


@pytest.mark.parametrize("trainable", ["bitfit", "linear_projection"])
def test_muon_without_a_matrix_is_refused(trainable):
    model = RetrievalModel(small_clip(), small_preprocess())
    set_trainable(model, trainable)
    with pytest.raises(UserError, match=f"--optimizer muon .* --trainable {trainable} trains none; use adamw"):
        make_optimizer(model, TrainOptions(optimizer="muon", trainable=trainable), torch.device("cpu"))


@pytest.mark.parametrize("optimizer, beta2", [("adamw", 0.98), ("lion", 0.99), ("muon", 0.98)])
def test_beta2_has_a_default_for_each_optimizer(optimizer, beta2):
    model = RetrievalModel(small_clip(), small_preprocess())
    for given, expected in ((None, beta2), (0.5, 0.5)):
        made = make_optimizer(model, TrainOptions(optimizer=optimizer, beta2=given), torch.device("cpu"))
        assert {group["betas"][1] for group in made.param_groups if "parts" not in group} == {expected}
