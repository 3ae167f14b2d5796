"""Muon for the weight matrices of linear layers, and AdamW for all other parameters, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by the nearest
matrix with orthonormal rows or columns. It is torch's. The update is scaled to the size of AdamW's (Liu et al. 2025,
arXiv:2502.16982), so that one learning rate and one weight decay serve both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clip_retrieval.models.layers import place_parameters
from clip_retrieval.models.lora import HOLDER, find_linear, find_lora
from clip_retrieval.models.model_config import ClipModule


def hidden_matrices(clip: ClipModule) -> dict[str, int]:
    """Return the names of the weights that Muon updates, with the number of matrices in each.

    These are the weights of the towers' linear layers and LoRA's A and B, without the projections. A fused weight of
    queries, keys and values is three matrices. Embeddings and convolutions are not among them.
    """
    places = place_parameters(clip)
    found = {f"{owner}.{name}": parts for owner, _, name, parts in find_linear(clip, "all")}
    for each in find_lora(clip):
        place = f"{each.owner}{HOLDER}{each.name}.0"
        found |= {f"{place}.A": len(each.low_rank.A), f"{place}.B": len(each.low_rank.B)}
    return {name: parts for name, parts in found.items() if name in places and places[name].part != "head"}


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the groups that have `parts`, AdamW for the others.

    Args:
        groups: groups of parameters, with `lr` and `weight_decay`. `parts` has the number of matrices in each
            parameter, which are stacked along the first dimension.
        adamw: further arguments of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], **adamw: Any):
        super().__init__(groups, {})
        self._adamw = torch.optim.AdamW(self.param_groups, **adamw)  # adds its arguments to the groups
        self._muon = torch.optim.Muon([torch.empty(1, 1)], adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        if closure is not None:
            raise ValueError("a closure is not supported")
        # Muon, on views of the parameters, gradients and momenta
        groups: list[dict[str, Any]] = []
        state: dict[Tensor, dict[str, Tensor]] = {}
        for group in self.param_groups:
            if "parts" in group:
                views = self._view_matrices(group, state)
                groups.append(self._muon.defaults | {name: group[name] for name in ("lr", "weight_decay")} | views)
        self._muon.param_groups, self._muon.state = groups, state  # type: ignore[assignment]
        self._muon.step()
        # AdamW, on this optimizer's own groups and state
        self._adamw.param_groups = [group for group in self.param_groups if "parts" not in group]
        self._adamw.state = self.state
        self._adamw.step()

    def _view_matrices(self, group: dict[str, Any], state: dict[Tensor, dict[str, Tensor]]) -> dict[str, list[Tensor]]:
        """Return the matrices of a group with their gradients, and add their momenta to `state`."""
        matrices = []
        for parameter, parts in zip(group["params"], group["parts"], strict=True):
            if parameter.grad is None:
                continue
            own = self.state[parameter]
            if not own:
                own["momentum_buffer"] = torch.zeros_like(parameter)
            tensors = (parameter.detach(), parameter.grad, own["momentum_buffer"])
            for matrix, gradient, momentum in zip(*(_split(tensor, parts) for tensor in tensors), strict=True):
                matrix.grad = gradient
                state[matrix] = {"momentum_buffer": momentum}
                matrices.append(matrix)
        return {"params": matrices}


def _split(tensor: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Return views of the matrices of a (parts * rows, columns) or (parts, rows, columns)."""
    return tensor.unbind() if tensor.ndim == 3 else tensor.chunk(parts)
