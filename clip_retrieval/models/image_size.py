"""Input size of an image tower: resize the tower to another size, as open_clip's `force_image_size` does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from open_clip.timm_model import TimmModel
from timm.layers import resample_abs_pos_embed
from torch import nn

from clip_retrieval.errors import UserError
from clip_retrieval.models.config_schema import MOST_PATCHES
from clip_retrieval.models.model_config import ClipModule, State

ImageSize = int | Sequence[int]
"""Pixels of a square's side, or (height, width)."""

RESNET_STRIDE = 32
POSITIONS = ("positional_embedding", "attnpool.positional_embedding", "trunk.pos_embed")
"""Names of position embeddings, (..., tokens, width): one for each patch, perhaps others before them."""


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """Return (height, width) of a config's image size."""
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def format_size(size: ImageSize) -> str:
    """Return the size as it is typed: `224`, or `192 256`."""
    height, width = height_and_width(size)
    return str(height) if height == width else f"{height} {width}"


def check_image_size(visual: ClipModule, size: ImageSize, name: str, option: str = "--image_size") -> None:
    """Raise UserError, naming the option and the nearest sizes, unless both sides are multiples of the patch size.

    timm's own size passes: SigLIP's 384 is no multiple of 14. A CNN of timm needs a pixel of its last feature map.
    """
    sides, units = height_and_width(size), patch_size(visual)
    if isinstance(visual, TimmModel):
        if sides == _present_size(visual):
            return
        stages = getattr(visual.trunk, "feature_info", None)
        smallest = stages[-1]["reduction"] if stages and units == (1, 1) else 1
        if min(sides) < smallest:
            raise UserError(f"{option} {format_size(size)}: must be at least {smallest} for {name}; give a larger one")
    if all(side % unit == 0 for side, unit in zip(sides, units)):
        return
    smaller = [max(side // unit, 1) * unit for side, unit in zip(sides, units)]
    larger = [math.ceil(side / unit) * unit for side, unit in zip(sides, units)]
    nearest = " or ".join(dict.fromkeys((format_size(smaller), format_size(larger))))
    raise UserError(
        f"{option} {format_size(size)}: must be a multiple of {format_size(units)} for {name}; give {nearest}"
    )


def patch_size(visual: ClipModule) -> tuple[int, int]:
    """Return the pixels (height, width) of a patch, or of a cell that a ResNet pools; (1, 1) for other CNNs."""
    if hasattr(visual, "attnpool"):
        return RESNET_STRIDE, RESNET_STRIDE
    if isinstance(visual, TimmModel):
        # for ViTamin's patches, which a CNN makes, `patch_size` counts the pixels of the CNN's output
        ratio = getattr(getattr(visual.trunk, "patch_embed", None), "feat_ratio", None)
        return height_and_width(ratio(as_scalar=False)) if ratio else (1, 1)
    return getattr(visual, "patch_size", (1, 1))


def resize_to_weights(visual: ClipModule, state: State, *sizes: ImageSize) -> None:
    """Resize a tower to the size of the weights `state`: the first size that fits their shapes.

    Tries `sizes`, the tower's present size (timm's), and the square with as many patches as there are positions. If
    none fits, the first of `sizes` is kept.
    """
    for size in (*sizes, _present_size(visual), _square_of(visual, state), sizes[0]):
        if size is not None:
            resize_image_tower(visual, size)
            if _has_shapes_of(visual, state):
                return


def resize_image_tower(visual: ClipModule, size: ImageSize) -> None:
    """Resize a tower: interpolate its position embeddings and bias tables; compute windows and rotary embeddings anew.

    timm scales Swin's windows with the image. Does nothing for CNNs, which take any size.
    """
    height, width = height_and_width(size)
    if isinstance(visual, TimmModel):
        if _present_size(visual) != (height, width) and hasattr(visual.trunk, "set_input_size"):
            # Swin's patches are small, but its windows, whose masks need memory, large
            cells = math.prod(_grid((height, width), [max(side, 8) for side in patch_size(visual)]))
            if cells > MOST_PATCHES:
                raise ValueError(f"more than {MOST_PATCHES:,} patches")
            visual.set_input_size((height, width))
        return
    pool: ClipModule = getattr(visual, "attnpool", visual)
    positions = getattr(pool, "positional_embedding", None)
    if positions is None:
        return
    units = patch_size(visual)
    # not open_clip's resize_pos_embed: it keeps the positions of 6 x 6 patches for 4 x 9
    with torch.no_grad():
        resized = resample_abs_pos_embed(
            positions[None], list(_grid((height, width), units)), list(_grid(visual.image_size, units))
        )
    pool.positional_embedding = nn.Parameter(resized[0], requires_grad=positions.requires_grad)
    visual.image_size = (height, width)
    if hasattr(visual, "grid_size"):
        visual.grid_size = _grid((height, width), units)


def _present_size(visual: ClipModule) -> ImageSize | None:
    """Return the size that a tower was built for or resized to; None for a CNN."""
    if isinstance(visual, TimmModel):
        return getattr(getattr(visual.trunk, "patch_embed", None), "img_size", None)
    return getattr(visual, "image_size", None)


def _grid(size: ImageSize, units: Sequence[int]) -> tuple[int, int]:
    """Return the number of patches, vertically and horizontally."""
    height, width = height_and_width(size)
    return height // units[0], width // units[1]


def _has_shapes_of(visual: ClipModule, state: State) -> bool:
    own = {f"visual.{name}": value.shape for name, value in visual.state_dict().items()}
    return all(state[name].shape == shape for name, shape in own.items() if name in state)


def _square_of(visual: ClipModule, state: State) -> ImageSize | None:
    """Return the square size for whose patches `state` has positions, or None."""
    parameters, size, units = dict(visual.named_parameters()), _present_size(visual), patch_size(visual)
    name = next((name for name in POSITIONS if name in parameters and f"visual.{name}" in state), None)
    if name is None or size is None:
        return None
    own, weights = parameters[name].shape, state[f"visual.{name}"].shape
    if len(weights) != len(own) or weights[-1] != own[-1]:
        return None
    others = own[-2] - math.prod(_grid(size, units))
    side = math.isqrt(max(weights[-2] - others, 0))
    return (side * units[0], side * units[1]) if side else None
