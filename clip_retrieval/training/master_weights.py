"""Mixed precision with float32 master weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from clip_retrieval.models.towers import RetrievalModel


class MasterWeights:
    """The float32 weights of a model, for a copy of the model that computes in bf16 or fp16.

    The optimizer updates the master weights. Before each step the copy receives them, rounded; the gradients of the
    copy are added to those of the master weights in float32, over chunks and over processes. Both models share the
    parameters that stay float32 (see `RetrievalModel.copy_in`).

    Args:
        model: the model with the master weights.
        copy: its copy.
    """

    def __init__(self, model: RetrievalModel, copy: RetrievalModel):
        pairs = list(zip(model.parameters(), copy.parameters(), strict=True))
        own = [(master, copied) for master, copied in pairs if master.requires_grad and master is not copied]
        self._masters: list[Tensor] = [master for master, _ in own]
        self._copies: list[Tensor] = [copied for _, copied in own]

    @torch.no_grad()
    def cast(self) -> None:
        """Round the master weights to the precision of the copy."""
        if self._copies:  # with LoRA, all trainable parameters are shared
            torch._foreach_copy_(self._copies, self._masters)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Move the gradients of the copy to the master weights, added to those that are there."""
        used = [(master, own.grad) for master, own in zip(self._masters, self._copies) if own.grad is not None]
        if not used:
            return
        gradients = [torch.empty_like(master) for master, _ in used]
        torch._foreach_copy_(gradients, [gradient for _, gradient in used])
        # add to the gradients of earlier chunks in one kernel
        earlier = [(master.grad, gradient) for (master, _), gradient in zip(used, gradients) if master.grad is not None]
        if earlier:
            torch._foreach_add_([total for total, _ in earlier], [gradient for _, gradient in earlier])
        for (master, _), gradient in zip(used, gradients):
            master.grad = gradient if master.grad is None else master.grad
        self.free_gradients()

    def average_over_processes(self, towers: DistributedDataParallel) -> None:
        """Make `towers`, which wraps the copy, average gradients in float32, into those of the master weights."""
        masters = {id(copied): master for master, copied in zip(self._masters, self._copies)}
        world_size = dist.get_world_size()

        def average(_, bucket):  # register_comm_hook refuses annotations that are strings
            # add the gradients of earlier chunks
            buffer, parameters = bucket.buffer(), [masters.get(id(p)) for p in bucket.parameters()]
            total = buffer.float()
            parts = _views_like(bucket.gradients(), buffer, total)
            for master, part in zip(parameters, parts):
                if master is not None and master.grad is not None:
                    part += master.grad
            # average
            total /= world_size
            future = dist.all_reduce(total, async_op=True).get_future()

            def store(_: torch.futures.Future[list[Tensor]]) -> Tensor:
                for master, part in zip(parameters, parts):
                    if master is not None:
                        master.grad = part
                return total if buffer.dtype == total.dtype else buffer

            return future.then(store)

        towers.register_comm_hook(None, average)

    def free_gradients(self) -> None:
        """Delete the gradients of the copy."""
        for copied in self._copies:
            copied.grad = None


def _views_like(gradients: Sequence[Tensor], buffer: Tensor, other: Tensor) -> list[Tensor]:
    """Return views of `other` where `gradients` are views of `buffer`."""
    return [
        other.as_strided(gradient.size(), gradient.stride(), gradient.storage_offset() - buffer.storage_offset())
        for gradient in gradients
    ]
