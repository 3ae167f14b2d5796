"""The processes of a run that torchrun started, and their collective operations.

torchrun --nproc_per_node 8 main.py --vision_model ViT-B/32

A run of one process uses the same code: every operation returns its input.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clip_retrieval.errors import UserError, format_counts
from clip_retrieval.log import log

# torch renamed these, and new versions warn about the old names. Builds without torch.distributed have neither.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


@dataclass(frozen=True)
class Processes:
    """The process group of a run, as seen by this process.

    Attributes:
        rank: the number of this process, from 0. Rank 0 writes the files and the log.
        world_size: the number of processes.
        shares_gpus: whether processes share a GPU: gloo, which has no all_gather and reduce_scatter of CUDA tensors,
            replaces NCCL, which refuses two processes on one GPU.
    """

    rank: int = 0
    world_size: int = 1
    shares_gpus: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """Take the maximum over all processes, in place."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor, operation)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is True in any process."""
        return flag if self.world_size == 1 else bool(self.max(torch.tensor(int(flag))))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the (n, ...) of all processes, in the order of ranks, to (world_size * n, ...).

        The gradient of a part is the sum of its gradients in all processes.
        """
        return tensor if self.world_size == 1 else _AllGather.apply(tensor, self)

    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        """Concatenate parts of different lengths, in the order of ranks, without a gradient."""
        if self.world_size == 1:
            return tensor
        lengths = self.all_gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = self.all_gather(padded).unflatten(0, (self.world_size, max(lengths)))
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def broadcast(self, state: dict[str, Tensor]) -> None:
        """Overwrite the tensors of `state` with those of rank 0."""
        if self.world_size > 1:
            for tensor in state.values():
                dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            self.any(False)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run a block in rank 0 before the other processes (a download, a cache)."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        own = tensor.cpu() if processes.shares_gpus else tensor
        gathered = own.new_empty(processes.world_size * len(own), *own.shape[1:])
        _all_gather(gathered, own.contiguous())
        return gathered.to(tensor.device)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        whole = gradient.cpu() if ctx.processes.shares_gpus else gradient
        part = whole.new_empty(len(whole) // ctx.processes.world_size, *whole.shape[1:])
        _reduce_scatter(part, whole.contiguous())
        return part.to(gradient.device), None


SINGLE_PROCESS = Processes()


@contextlib.contextmanager
def process_group(device: str | None) -> Iterator[Processes]:
    """Join the process group if torchrun started this process. `device` is the value of --device.

    On one machine, more processes than GPUs share them. Raises UserError for that on several machines.
    """
    if (world_size := int(os.environ.get("WORLD_SIZE", 1))) == 1:
        yield SINGLE_PROCESS
        return
    on_gpus = torch.cuda.is_available() and device in (None, "cuda")
    if device not in (None, "cuda", "cpu"):
        raise UserError(f"--device {device}: torchrun assigns the GPUs to the processes; use cuda or cpu")
    shares_gpus = on_gpus and _choose_gpu(world_size)
    # A long timeout: rank 0 may download, or build a cache of images. torchrun notices lost processes.
    backend = "cpu:gloo,cuda:nccl" if on_gpus and not shares_gpus else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))
    yield Processes(int(os.environ["RANK"]), world_size, shares_gpus)
    # Not after an error: the others may be blocked in a collective operation, and torchrun ends them.
    dist.destroy_process_group()


def _choose_gpu(world_size: int) -> bool:
    """Make one of this machine's GPUs the current device; return whether processes share GPUs."""
    gpus, local_rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    torch.cuda.set_device(local_rank % gpus)
    if local_processes <= gpus:
        return False
    available = format_counts(GPU=gpus)
    if local_processes < world_size:  # other machines may have enough GPUs, and all need the same backend
        raise UserError(f"torchrun: {local_processes} processes on a machine with {available}; use as many as GPUs")
    log.warning(
        f"{local_processes} processes share {available}: this tests a run of several processes, and is slower than "
        f"--nproc_per_node {gpus}"
    )
    return True
