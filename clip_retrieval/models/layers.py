"""The layer of each parameter, for learning rates and freezing by depth."""

from __future__ import annotations

import re
from typing import NamedTuple

from open_clip.timm_model import TimmModel
from timm.models._manipulate import group_with_matcher
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clip_retrieval.models.model_config import ClipModule
from clip_retrieval.models.projection import text_projection, vision_projection

BLOCK = re.compile(
    r"(?:^|\.)(?:resblocks|blocks?|layers?)\.(\d+)\."  # transformers, of open_clip and Hugging Face
    r"|^(?:trunk\.)?layer(\d+)\."  # the stages of a ResNet, counted from 1
    r"|^trunk\.features\.(\d+)\."  # those of torchvision's EfficientNet, whose first one is the stem
)
BEHIND = re.compile(
    r"proj\b|ln_post\.|attn_?pool\.|head\.|ln_final\.|text_projection|pooler\.|transformer\.(encoder\.)?\w*(pooler|norm)\."
)
"""Layers behind the last block."""


class Place(NamedTuple):
    """The place of a parameter in its model.

    Attributes:
        part: "image" or "text" for a parameter of a tower, "head" for the projections, logit scale and bias.
        depth: 0 behind the last block, 1 in the last block, and so on; highest for the embeddings.
    """

    part: str
    depth: int


def place_parameters(clip: ClipModule) -> dict[str, Place]:
    """Locate each parameter of a model by its name.

    A block is a transformer's block, a stage of open_clip's and torchvision's CNNs, or a group of timm's
    (`group_matcher`).
    """
    head = {id(p) for find in (vision_projection, text_projection) for p in find(clip).parameters()}
    names: dict[str, dict[str, str]] = {"image": {}, "text": {}}  # in the tower: in the model
    places = {}
    for name, parameter in clip.named_parameters():
        if id(parameter) in head or name in ("logit_scale", "logit_bias") or name.startswith("text_decoder."):
            places[name] = Place("head", 0)
        elif name.startswith("visual."):
            names["image"][name.removeprefix("visual.")] = name
        else:
            names["text"][name.removeprefix("text.")] = name
    for part, in_model in names.items():
        tower = clip.visual if part == "image" else getattr(clip, "text", clip)
        depths = _timm_depths(tower, list(in_model)) if isinstance(tower, TimmModel) else _depths(list(in_model))
        places |= {in_model[name]: Place(part, depth) for name, depth in depths.items()}
    return places


def _depths(names: list[str]) -> dict[str, int]:
    blocks = {name: _block(name) for name in names}
    distinct = sorted({block for block in blocks.values() if block is not None})
    index = {block: number for number, block in enumerate(distinct)}
    depths = {}
    for name, block in blocks.items():
        outside = 0 if BEHIND.match(name) else len(index) + 1
        depths[name] = outside if block is None else len(index) - index[block]
    return depths


def _block(name: str) -> int | None:
    match = BLOCK.search(name)
    number = None if match is None else next(int(group) for group in match.groups() if group)
    return None if number == 0 and name.startswith("trunk.features.") else number


def _timm_depths(tower: TimmModel, names: list[str]) -> dict[str, int]:
    """Return the depths in timm's groups, which count the norm behind the last block to that block."""
    trunk = [(name.removeprefix("trunk."), None) for name in names if name.startswith("trunk.")]
    groups = group_with_matcher(iter([*trunk, ("\0", None)]), tower.trunk.group_matcher(), reverse=True)
    last = groups["\0"]  # a name that no pattern matches belongs behind the last block
    return {name: last - groups.get(name.removeprefix("trunk."), last) for name in names}


def frozen_layers(module: nn.Module, locked: set[int]) -> list[nn.Module]:
    """Return the largest parts of a module with only `locked` parameters (ids), and batch norms with frozen weights."""
    norm_weight = module.weight if isinstance(module, _BatchNorm) else None
    parameters = list(module.parameters())
    if parameters and all(id(parameter) in locked for parameter in parameters):
        return [module]
    if norm_weight is not None and not norm_weight.requires_grad:
        return [module]
    return [layer for child in module.children() for layer in frozen_layers(child, locked)]
