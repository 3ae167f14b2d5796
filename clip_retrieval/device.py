"""Devices and precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from clip_retrieval.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CUBLAS_WORKSPACES = (":4096:8", ":16:8")
"""The values of CUBLAS_WORKSPACE_CONFIG that make cuBLAS deterministic."""


def choose_device(asked: str | None) -> torch.device:
    """Return the device `asked` for, by default the best one. Raises UserError if it is not available."""
    if asked is None:
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise UserError(f"--device {asked}: unknown device; choose cuda, mps or cpu") from None
    available = {
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if not available.get(device.type, False):
        raise UserError(f"--device {asked}: not available here; drop --device to use the best available one")
    return device


def choose_precision(asked: str, device: torch.device) -> str:
    """Return the training precision. "auto" is bf16 on a GPU that supports it, fp16 on other GPUs, else fp32."""
    if asked == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if asked == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16: fp16 needs a GPU; choose fp32 or bf16")
    return asked


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Make the gradient scaler for fp16. It is disabled for the other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16" and device.type != "cpu")


@contextmanager
def deterministic_algorithms(device: torch.device, on_gpu: bool = False) -> Iterator[None]:
    """Make training steps in this block bit-identical from run to run, for a fixed number of threads.

    A CPU is always deterministic, at no cost in speed. A GPU is deterministic only with `on_gpu`, because that is
    slower: it selects deterministic kernels, sets a cuBLAS workspace, and disables cuDNN's benchmark.
    """
    if device.type != "cpu" and not on_gpu:
        yield
        return
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in CUBLAS_WORKSPACES:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = CUBLAS_WORKSPACES[0]  # cuBLAS reads it at its first use
    cudnn = torch.backends.cudnn
    memory: Any = torch.utils.deterministic  # a module with a property, which type checkers do not see
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    before_cudnn, before_fill = (cudnn.deterministic, cudnn.benchmark), memory.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # it costs time: it fills every new tensor with NaN
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = before_fill
        cudnn.deterministic, cudnn.benchmark = before_cudnn


@contextmanager
def disable_tf32() -> Iterator[None]:
    """Compute float32 products and convolutions in float32: without TF32 (cuDNN's default) or bfloat16 passes.

    Autocast does not cast products that write to `out`.
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
    """Return the name of the GPU, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
