"""Image towers for images of several sizes: their position embeddings are interpolated in the forward pass.

Parameters, names and state dicts stay the same, and so do features at the tower's own size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from timm.layers import Format, resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from clip_retrieval.errors import UserError
from clip_retrieval.models.image_size import ImageSize, check_image_size, format_size, height_and_width, patch_size
from clip_retrieval.models.libraries import translate_errors
from clip_retrieval.models.model_config import ClipModule

Grid = tuple[int, int]
"""Patches of an image, vertically and horizontally."""


def accept_smaller_images(visual: ClipModule, full: ImageSize, smaller: ImageSize) -> None:
    """Make a tower for images of the size `full` also compute images of the size `smaller` (--start_image_size).

    Its features there are those of the tower after `image_size.resize_image_tower`. Works for ViTs of open_clip and
    timm, and for CNNs. Raises UserError for a size that does not fit the tower, and for a tower with another dependence
    on the image size, such as Swin's windows.
    """
    (height, width), small = height_and_width(full), height_and_width(smaller)
    if small == (height, width) or small[0] > height or small[1] > width:
        raise UserError(
            f"--start_image_size {format_size(small)}: must be below the image size, {format_size(full)}; lower it"
        )
    check_image_size(visual, small, "this model", "--start_image_size")
    name = type(getattr(visual, "trunk", visual)).__name__
    units, trunk = patch_size(visual), getattr(visual, "trunk", None)
    grid = (height // units[0], width // units[1])
    if isinstance(visual, VisionTransformer):
        _interpolate(
            visual, "positional_embedding", "_embeds", grid, lambda x: (x.shape[2] // units[0], x.shape[3] // units[1])
        )
    elif isinstance(visual, ModifiedResNet):
        _interpolate(visual.attnpool, "positional_embedding", "forward", grid, lambda x: x.shape[-2:])
    elif isinstance(trunk, (TimmVisionTransformer, Eva)):
        _interpolate_timm(trunk)
    # try it
    weight, training = next(visual.parameters()), {module: module.training for module in visual.modules()}
    problem = f"--start_image_size: this model's image tower ({name}) takes one size only"
    with translate_errors(problem, "drop it"), torch.no_grad():
        visual.eval()(weight.new_zeros(1, 3, *small))
    for module, mode in training.items():
        module.training = mode


def _interpolate_timm(trunk: ClipModule) -> None:
    trunk.dynamic_img_size = True  # the patches keep their rows and columns: (n, rows, columns, width)
    trunk.patch_embed.flatten, trunk.patch_embed.output_fmt = False, Format.NHWC
    trunk.patch_embed.img_size = None  # no check of the size
    _interpolate(trunk, "pos_embed", "_pos_embed", trunk.patch_embed.grid_size, lambda x: x.shape[1:3])


def _interpolate(
    module: nn.Module, name: str, method: str, own: Grid, read_grid: Callable[[Tensor], Sequence[int]]
) -> None:
    """Make `method` of a module see its parameter `name` at the size of the patches of its input.

    Args:
        module: its class is changed.
        name: a position embedding (..., tokens, width): one for each patch, perhaps others before them.
        method: it takes the input, and reads the parameter.
        own: the patches that the parameter is for.
        read_grid: returns the patches of an input.
    """
    cls = type(module)
    matrices: dict[tuple[Grid, torch.device], Tensor] = {}
    grids = [own]  # that of the call in progress is the last one

    def run(self: ClipModule, x: Tensor) -> Tensor:
        rows, columns = read_grid(x)
        if (rows, columns) == own:
            return getattr(cls, method)(self, x)
        grids.append((rows, columns))
        try:
            with _timm_at(self, grids[-1]):
                return getattr(cls, method)(self, x)
        finally:
            grids.pop()

    def positions(self: nn.Module) -> Tensor | None:
        parameter, grid = self._parameters.get(name), grids[-1]
        if parameter is None or grid == own:
            return parameter
        key = (grid, parameter.device)
        if key not in matrices:
            matrices[key] = interpolation_matrix(own, grid).to(parameter.device)
        others = parameter.shape[-2] - own[0] * own[1]
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        resized = matrices[key].to(dtype) @ parameter[..., others:, :].to(dtype)
        return torch.cat([parameter[..., :others, :], resized.to(parameter.dtype)], dim=-2)

    module.__class__ = type(f"AnySize{cls.__name__}", (cls,), {method: run, name: property(positions)})


@contextmanager
def _timm_at(trunk: ClipModule, grid: Grid) -> Iterator[None]:
    """Give a trunk of timm the patches of another image: it interpolates nothing itself, and rotates by them."""
    embed, rope = getattr(trunk, "patch_embed", None), getattr(trunk, "rope", None)
    own = embed.grid_size if embed is not None else None
    try:
        if embed is not None:
            embed.grid_size = grid
        if hasattr(rope, "update_feat_shape"):
            trunk.rope = copy.deepcopy(rope)
            trunk.rope.update_feat_shape(grid)
        yield
    finally:
        if embed is not None:
            embed.grid_size = own
        if rope is not None:
            trunk.rope = rope


def interpolation_matrix(own: Grid, other: Grid) -> Tensor:
    """Return the bicubic interpolation of position embeddings as a matrix, float32 (patches of other, patches of own).

    Unlike torch's interpolation, a product with it has a deterministic backward pass on a GPU.
    """
    positions = torch.eye(own[0] * own[1])[None]
    return resample_abs_pos_embed(positions, list(other), list(own), num_prefix_tokens=0)[0]
