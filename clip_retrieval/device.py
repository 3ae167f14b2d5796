"""Devices, and the precision they compute in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from clip_retrieval.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CUBLAS_WORKSPACES = (":4096:8", ":16:8")
"""Values of CUBLAS_WORKSPACE_CONFIG under which cuBLAS is deterministic."""


def choose_device(asked: str | None) -> torch.device:
    """The device asked for, or the best there is. Raises UserError for one that is not there."""
    if asked is None:
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise UserError(f"--device {asked}: no such kind of device; choose cuda, mps or cpu") from None
    available = {
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if not available.get(device.type, False):
        raise UserError(f"--device {asked}: there is no such device here; leave --device out to take the best there is")
    return device


def choose_precision(asked: str, device: torch.device) -> str:
    """Training precision: "auto" is bf16 where the GPU has it, else fp16, and fp32 elsewhere."""
    if asked == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if asked == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU choose fp32 or bf16")
    return asked


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Mixed precision for the forward pass; the weights stay float32."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler that fp16 needs; it does nothing with the other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16" and device.type != "cpu")


@contextmanager
def deterministic_algorithms(device: torch.device, on_gpu: bool = False) -> Iterator[None]:
    """A block in which the same training step gives the same weights, bit for bit, at a fixed number of threads.

    On a CPU always: the few operations that differ from run to run have an equally fast deterministic form. On a GPU
    only if `on_gpu`, because there it costs speed: deterministic kernels, a cuBLAS workspace for them, and no search
    for the fastest convolution.
    """
    if device.type != "cpu" and not on_gpu:
        yield
        return
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in CUBLAS_WORKSPACES:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = CUBLAS_WORKSPACES[0]  # read when cuBLAS is first used
    cudnn, memory = torch.backends.cudnn, torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    before_cudnn, before_fill = (cudnn.deterministic, cudnn.benchmark), memory.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # it would write NaN to every new tensor
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = before_fill
        cudnn.deterministic, cudnn.benchmark = before_cudnn


@contextmanager
def disable_tf32() -> Iterator[None]:
    """Float32 products and convolutions are float32: no TF32 (cuDNN's default) and no bfloat16 passes.

    (Autocast leaves products alone that write to `out`.)
    """
    backends = [
        module
        for library in (torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn)
        for name in ("matmul", "conv")
        if (module := getattr(library, name, None)) is not None
    ]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


def device_name(device: torch.device) -> str:
    """The device in words, for the record."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
