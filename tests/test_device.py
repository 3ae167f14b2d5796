"""The choice of device and precision."""

import pytest
import torch

from clip_retrieval.device import choose_device, choose_precision, disable_tf32, make_scaler
from clip_retrieval.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_default_device_is_the_best_available(monkeypatch):
    assert choose_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device(None) == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device(None) == torch.device("mps")
    with pytest.raises(UserError, match="cuda"):
        choose_device("cuda")


@pytest.mark.parametrize("has_bf16, expected", [(True, "bf16"), (False, "fp16")])
def test_auto_precision_is_bf16_if_the_gpu_supports_it(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    assert choose_precision("auto", CUDA) == expected
    assert choose_precision("auto", CPU) == "fp32"
    assert choose_precision("fp32", CUDA) == "fp32"


def test_fp16_needs_a_gpu_and_a_scaler():
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_precision("fp16", CPU)
    if torch.cuda.is_available():
        assert make_scaler("fp16", CUDA).is_enabled()
    assert not make_scaler("bf16", CPU).is_enabled()


def test_disable_tf32_restores_the_settings():
    def settings():
        backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul)
        return [backend.fp32_precision for backend in backends]

    before = settings()
    with disable_tf32():
        assert settings() == ["ieee"] * 3
    assert settings() == before
