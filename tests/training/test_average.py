"""The averages of --ema and --swa_start."""

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.options import TrainOptions
from clip_retrieval.training.average import WeightAverage, ema_share, make_averages, swa_share
from tests.training.test_trainer import batch, make_trainer


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "options", [{}, {"grad_cache": 3}, {"precision": "bf16"}, {"resnet": True}, {"grad_clip": 0.1}], ids=str
)
@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_ema_equals_a_float64_loop_over_the_master_weights(options, decay):
    trainer = make_trainer(ema=decay, **options)
    expected = {}
    for step in range(5):
        trainer.step(batch(seed=step, size=32 if "resnet" in options else 16), step + 1, 1e-2)
        kept = min(decay, 1 - (1 + step) ** (-2 / 3))
        for name, weight in trainable(trainer.model).items():
            expected[name] = kept * expected.get(name, 0) + (1 - kept) * weight.detach().double()
    found = trainer.averages["ema"].state_dict()["weights"]
    assert found.keys() == expected.keys() and len(found) > 30
    for name, average in found.items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected[name], atol=1e-6, rtol=1e-5, msg=name)
    assert not torch.equal(found["clip.logit_scale"], trainer.model.clip.logit_scale)


def test_ema_equals_timm_with_its_warmup():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ours, timm = WeightAverage(model, ema_share(0.8)), ModelEmaV3(model, decay=0.8, use_warmup=True, warmup_gamma=1.0)
    for step in range(20):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
        ours.update()
        timm.update(model, step=step + 1)
    found = ours.state_dict()["weights"]
    for name, weight in timm.module.named_parameters():
        torch.testing.assert_close(found[name], weight)


def test_swa_is_the_mean_of_its_updates():
    model, seen = nn.Linear(3, 2), []
    average = WeightAverage(model, swa_share)
    for _ in range(7):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update()
        seen.append(model.weight.detach().double())
    torch.testing.assert_close(average.state_dict()["weights"]["weight"].double(), torch.stack(seen).mean(0))


def test_applied_exchanges_the_weights_and_restores_them_after_an_error():
    trainer = make_trainer(ema=0.5)
    for step in (1, 2, 3):
        trainer.step(batch(seed=step), step, 1e-2)
    average = trainer.averages["ema"]
    raw = {name: weight.detach().clone() for name, weight in trainable(trainer.model).items()}
    mean = {name: weight.clone() for name, weight in average.state_dict()["weights"].items()}
    with pytest.raises(KeyboardInterrupt), average.applied():
        assert all(torch.equal(weight, mean[name]) for name, weight in trainable(trainer.model).items())
        raise KeyboardInterrupt
    assert all(torch.equal(weight, raw[name]) for name, weight in trainable(trainer.model).items())
    assert all(torch.equal(weight, mean[name]) for name, weight in average.state_dict()["weights"].items())


def test_average_does_not_change_training():
    ends = []
    for ema in (None, 0.9):
        trainer = make_trainer(ema=ema)
        for step in (1, 2, 3):
            trainer.step(batch(seed=step), step, 1e-2)
            for average in trainer.averages.values():
                with average.applied():
                    pass
        ends.append({name: weight.detach().clone() for name, weight in trainable(trainer.model).items()})
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())


def test_frozen_weights_are_not_averaged():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    average = WeightAverage(model, swa_share)
    average.update()
    assert list(average.state_dict()["weights"]) == ["1.weight", "1.bias"]


@pytest.mark.parametrize("change", ["shape", "dtype", "name", "missing", "none"])
def test_averages_of_another_model_are_refused(change):
    model = nn.Linear(3, 2)
    average = WeightAverage(model, swa_share)
    average.update()
    state = average.state_dict()
    weights = dict(state["weights"])
    if change == "shape":
        weights["weight"] = torch.zeros(2, 4)
    elif change == "dtype":
        weights["weight"] = weights["weight"].half()
    elif change == "name":
        weights = {"other": weights["weight"], "bias": weights["bias"]}
    elif change == "missing":
        del weights["bias"]
    else:
        weights = {}
    with pytest.raises(UserError, match=r"last\.pt: its averaged weights do not fit"):
        WeightAverage(model, swa_share).load_state_dict(state | {"weights": weights}, "last.pt")


def test_swa_warns_of_trainable_batch_normalisation(caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    trainer = make_trainer(resnet=True, swa_start=1)
    assert "statistics of batch normalisation" in caplog.text
    caplog.clear()
    trainer.model.clip.visual.requires_grad_(False)
    assert list(make_averages(trainer.model, TrainOptions(swa_start=1))) == ["swa"]
    assert not caplog.text


def test_without_options_there_is_no_average():
    assert make_trainer().averages == {}
