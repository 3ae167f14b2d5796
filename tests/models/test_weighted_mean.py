"""Weighted means of state dicts."""

import pytest
import torch

from clip_retrieval.errors import UserError
from clip_retrieval.models.weighted_mean import check_same_architecture, weighted_mean


def state(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(3, 4, generator=generator).to(dtype),
        "logit_scale": torch.randn((), generator=generator).to(dtype),
        "position_ids": torch.tensor([seed]),
    }


def test_mean_equals_a_float64_loop():
    states, weights = [state(seed) for seed in range(3)], [0.2, 0.5, 0.3]
    found = weighted_mean(states, weights)
    for name in ("weight", "logit_scale"):
        expected = sum(weight * each[name].double() for weight, each in zip(weights, states))
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected.float())
    assert found["position_ids"].item() == 2


@pytest.mark.parametrize("chosen", [0, 1])
def test_weights_of_zero_and_one_give_the_exact_tensors(chosen):
    states = [state(0), state(1)]
    states[1 - chosen]["weight"][0, 0] = torch.inf
    found = weighted_mean(states, [float(chosen == 0), float(chosen == 1)])
    assert torch.equal(found["weight"], states[chosen]["weight"])
    assert torch.equal(found["logit_scale"], states[chosen]["logit_scale"])


def test_dtype_is_that_of_the_last_state_or_given():
    states = [state(0), state(1, torch.float16)]
    assert weighted_mean(states, [0.5, 0.5])["weight"].dtype == torch.float16
    assert weighted_mean(states, [0.5, 0.5], torch.float64)["weight"].dtype == torch.float64


@pytest.mark.parametrize("change", ["shape", "name"])
def test_other_architectures_are_refused_in_one_line(change):
    other = state(1)
    if change == "shape":
        other["weight"] = torch.zeros(3, 5)
    else:
        other["extra"] = other.pop("weight")
    with pytest.raises(UserError, match=r"a\.pt and b\.pt have different architectures .* finetuned from") as error:
        check_same_architecture(state(0), other, ("a.pt", "b.pt"))
    assert "\n" not in str(error.value)
    check_same_architecture(state(0), state(1), ("a.pt", "b.pt"))
