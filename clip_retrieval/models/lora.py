"""Low-rank adaptation of linear layers (LoRA; Hu et al. 2021, arXiv:2106.09685).

A frozen weight W becomes W + alpha / rank * B A at each use, as a parametrization of the weight. So it works for every
module that reads the weight: open_clip's attention with one weight for queries, keys and values, which get a B A each,
timm's and Hugging Face's towers, and `models/pooled.py`. The merged weight is exactly the one that was trained. The
backward pass computes the gradient of each full weight; gradients and moments of only A and B are kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from clip_retrieval.errors import UserError
from clip_retrieval.models.model_config import ClipModule, State

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
MLP = re.compile(r"\bmlp\b|\bffn\b")
HOLDER = ".parametrizations."


@dataclass(frozen=True)
class LoraSettings:
    """The options of LoRA.

    Attributes:
        rank: columns of each B and rows of each A.
        alpha: the product B A is multiplied by alpha / rank.
        dropout: probability to drop an input of A. A weight does not see its inputs one by one, so all tokens of a
            forward pass have the same mask.
        targets: "attention": projections of queries, keys, values and outputs; "mlp": other linear layers; or "all".
        seed: of the random A; each B is zero, so the first features are those of W.
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = "attention"
    seed: int = 0


class LowRank(nn.Module):
    """The parametrization of a weight (parts * rows, columns): a B A for each of the parts, such as q, k and v."""

    def __init__(self, weight: Tensor, parts: int, settings: LoraSettings, generator: torch.Generator):
        super().__init__()
        rows, columns = weight.shape
        bound = columns**-0.5  # as in nn.Linear and the authors' loralib
        first = torch.empty(parts, settings.rank, columns).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(first.to(weight))
        self.B = nn.Parameter(weight.new_zeros(parts, rows // parts, settings.rank))
        self.scale = settings.alpha / settings.rank
        self.dropout = settings.dropout
        self.dtype: torch.dtype | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """Return W + scale * B A, rounded once to `dtype`, that of a copy in lower precision."""
        first: Tensor = self.A
        if self.training and self.dropout:
            first = first * F.dropout(torch.ones_like(first[:, :1]), self.dropout)
        return self._add(weight, first).to(self.dtype or weight.dtype)

    @torch.no_grad()
    def merge(self, weight: Tensor) -> Tensor:
        """Return W + scale * B A without dropout, in the dtype of W."""
        return self._add(weight, self.A)

    def _add(self, weight: Tensor, first: Tensor) -> Tensor:
        return torch.add(weight, (self.B @ first).flatten(0, 1), alpha=self.scale)


class Adapted(NamedTuple):
    """A weight with a LowRank.

    Attributes:
        owner, module, name: the module's name, the module, and the name of the weight in it.
        weight: the frozen weight.
        low_rank: its A and B.
    """

    owner: str
    module: nn.Module
    name: str
    weight: nn.Parameter
    low_rank: LowRank

    @property
    def key(self) -> str:
        """The weight's name in the state dict of the model without LoRA."""
        return f"{self.owner}.{self.name}"

    def tensors(self) -> State:
        """Return all that the merged weight depends on."""
        scale = torch.tensor(self.low_rank.scale, dtype=torch.float64)
        values = {"weight": self.weight, "A": self.low_rank.A, "B": self.low_rank.B, "scale": scale}
        return {f"{self.key}.{name}": value.detach() for name, value in values.items()}


def find_linear(module: nn.Module, targets: str) -> Iterator[tuple[str, nn.Module, str, int]]:
    """Yield name, module, name of the weight, and its parts, for each linear layer of the targets in a tower.

    A pooler of transformers is left out: open_clip's towers do not use it.
    """
    for name, layer in module.named_modules():
        if getattr(layer, "in_proj_weight", None) is not None:
            found = layer, "in_proj_weight", 3
        elif isinstance(layer, nn.Linear) and "pooler" not in name:
            is_fused = name.endswith("qkv") and layer.out_features == 3 * layer.in_features
            found = layer, "weight", 3 if is_fused else 1
        else:
            continue
        kind = "attention" if ATTENTION.search(name) and not MLP.search(name) else "mlp"
        if targets in ("all", kind):
            yield (name, *found)


def add_lora(layers: list[tuple[nn.Module, str, int]], settings: LoraSettings) -> None:
    """Parametrize weights, given as module, name of the weight, and its parts."""
    generator = torch.Generator().manual_seed(settings.seed)
    for module, name, parts in layers:
        weight = getattr(module, name)
        parametrize.register_parametrization(module, name, LowRank(weight, parts, settings, generator))


def find_lora(model: nn.Module) -> list[Adapted]:
    """Return the weights of a model that have a LowRank."""
    found = []
    for path, low_rank in model.named_modules():
        if isinstance(low_rank, LowRank):
            owner, _, place = path.rpartition(HOLDER)  # MODULE.parametrizations.WEIGHT.0
            weight = model.get_parameter(path.rpartition(".")[0] + ".original")
            found.append(Adapted(owner, model.get_submodule(owner), place.partition(".")[0], weight, low_rank))
    return found


def merge_state(clip: ClipModule) -> State:
    """Return the state dict with merged weights, under the names of the model without LoRA."""
    state, adapted = clip.state_dict(), find_lora(clip)
    if not adapted:
        return state
    others = {name: value for name, value in state.items() if HOLDER not in name}
    return others | {each.key: each.low_rank.merge(each.weight) for each in adapted}


def merge_lora(clip: ClipModule) -> None:
    """Replace each weight that has a LowRank by the merged one."""
    for each in find_lora(clip):
        merged = each.low_rank.merge(each.weight)
        parametrize.remove_parametrizations(each.module, each.name, leave_parametrized=False)
        each.module.get_parameter(each.name).data.copy_(merged)


def lora_state(clip: ClipModule) -> State | None:
    """Return the tensors from which a run resumes exactly; None without LoRA."""
    return {name: value for each in find_lora(clip) for name, value in each.tensors().items()} or None


def load_lora(clip: ClipModule, state: State | None, source: Path) -> None:
    """Load a `lora_state`. Raises UserError, naming `source`, if it does not fit the model or --lora_alpha."""
    own, state = lora_state(clip) or {}, state or {}
    if own.keys() != state.keys() or not all(_fits(state[name], value) for name, value in own.items()):
        raise UserError(f"{source}: its LoRA weights do not fit the model; add --reset_optimizer to train new ones")
    for name, value in own.items():
        if name.endswith(".scale") and value != state[name]:
            raise UserError(
                f"--lora_alpha: {source} was trained with alpha / rank {state[name].item():g}, not {value.item():g}; "
                "give that of the run, or add --reset_optimizer"
            )
        value.copy_(state[name])


def _fits(value: Tensor, own: Tensor) -> bool:
    return value.shape == own.shape and value.dtype == own.dtype and bool(value.isfinite().all())
