"""Batch normalisation over the batches of all processes, so that results do not depend on their number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clip_retrieval.errors import UserError


def share_statistics(model: nn.Module, device: torch.device, *, shares_gpus: bool = False) -> nn.Module:
    """Make the batch normalisation layers of `model` share their statistics between processes.

    torch's SyncBatchNorm needs a GPU for each process; this works on CPUs as well. Raises UserError for a layer type
    that has no CPU version.
    """
    if device.type == "cuda" and not shares_gpus:
        return convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = _SharedBatchNorm
        elif isinstance(module, _BatchNorm):
            raise UserError(
                f"this model's {type(module).__name__} cannot share batch statistics between processes on a CPU; train "
                "it in one process, or on GPUs"
            )
    return model


class _SharedBatchNorm(_BatchNorm):
    """Batch normalisation over the batches of all processes, for inputs with any number of dimensions."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        axes = [0, *range(2, input.ndim)]
        count = input.numel() // input.shape[1] * dist.get_world_size()
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        mean = _Sum.apply(values.sum(axes)) / count
        centred = values - _per_channel(mean, input)
        variance = _Sum.apply(centred.square().sum(axes)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * _per_channel(scale, input) + _per_channel(self.bias, input)).to(input.dtype)


class _Sum(torch.autograd.Function):
    """All-reduce sum; the backward pass sums the gradients of all processes."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.ndim - 2))


@contextmanager
def freeze_statistics(model: nn.Module) -> Iterator[None]:
    """Keep the running statistics unchanged inside the block; batches are normalised as in training."""
    modules = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [(module.momentum, module.num_batches_tracked) for module in modules]
    for module in modules:
        module.momentum = 0.0
        module.num_batches_tracked = None if module.num_batches_tracked is None else module.num_batches_tracked.clone()
    try:
        yield
    finally:
        for module, (momentum, count) in zip(modules, before, strict=True):
            module.momentum, module.num_batches_tracked = momentum, count
