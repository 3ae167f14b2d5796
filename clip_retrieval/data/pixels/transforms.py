"""Resize and crop images for the model.

open_clip's own evaluation transform is the reference. Its resizing and cropping run in the process that loads an image;
pixels are transferred as uint8, and scaled and normalised on the device.

Decoder "pillow" is bit-identical to the reference. "fast" resizes the same decoded pixels to the same sizes with
torch's uint8 kernels, whose fixed-point weights cause differences of one or two grey levels. Both decode with Pillow,
because decoding is not the bottleneck (benchmarks/input.py). "gpu" resizes decoded images of any device in float32; see
`jpeg`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL
import torch
from open_clip.transform import MaybeToTensor, PreprocessCfg, ResizeKeepRatio, image_transform_v2
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize
from torchvision.transforms.v2 import functional as F

from clip_retrieval.data.images.decode import shorten_middle

RESIZE_SIZE = "resize_size"
SPARE = 8 / 7  # short side of images for random crops / model size: 256 for 224
PILLOW_13 = int(PIL.__version__.partition(".")[0]) >= 13


def to_tensor(image: Image.Image | np.ndarray) -> torch.Tensor:
    """Copy an RGB image or uint8 (height, width, 3) to a tensor: uint8 (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize(
    image: Image.Image | np.ndarray,
    size: tuple[int, int],
    decoder: str,
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
) -> torch.Tensor:
    """Resize an RGB image or uint8 (height, width, 3) to `size` (height, width): uint8 (3, *size)."""
    height, width = size
    if decoder == "pillow":
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        return to_tensor(F.resize(image, [height, width], interpolation))
    pixels = to_tensor(image)
    # Each pass clips, so their order matters. torch resizes horizontally, then vertically. Pillow does too, but from
    # version 13 on it reverses the order for images that are tall in this sense (libImaging/Resample.c).
    is_tall = pixels.shape[1] - height > max(2 * (pixels.shape[2] - width), 0)
    if is_tall and PILLOW_13:
        pixels = F.resize(pixels, [height, pixels.shape[2]], interpolation, antialias=True)
    return F.resize(pixels, [height, width], interpolation, antialias=True)


def resize_decoded(images: torch.Tensor, size: Sequence[int], interpolation: InterpolationMode) -> torch.Tensor:
    """Resize uint8 (n, 3, height, width) to `size` (height, width) on its device, with antialiasing in float32."""
    resized = interpolate(images.float(), list(size), mode=interpolation.value, antialias=True)
    return resized.round_().clamp_(0, 255).byte()


def evaluation_transform(preprocess: dict, decoder: str = "pillow") -> Callable[[Any], torch.Tensor]:
    """Make the resizing and cropping of open_clip's evaluation transform: RGB image to uint8 (3, height, width).

    With decoder "gpu", uint8 (n, 3, any height, any width) to (n, 3, height, width). With `resize_size`, images are
    resized to it and cropped to `size`, as transformers does.
    """
    settings = {name: value for name, value in preprocess.items() if name != RESIZE_SIZE}
    resize_size = preprocess.get(RESIZE_SIZE)
    if resize_size:
        settings["size"] = resize_size
    reference = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    steps = [step for step in reference.transforms if not isinstance(step, (MaybeToTensor, Normalize))]
    if resize_size:
        steps = [*(step for step in steps if not isinstance(step, CenterCrop)), CenterCrop(model_size(preprocess))]
    if preprocess.get("resize_mode") == "longest" and decoder != "gpu":  # the short side may become less than a pixel
        steps.insert(0, partial(shorten_middle, longest=min(model_size(preprocess))))
    if decoder == "pillow":
        return Compose([*steps, to_tensor])
    # The steps after resizing (cropping, padding) also take tensors.
    resize = next(i for i, step in enumerate(steps) if isinstance(step, (Resize, ResizeKeepRatio)))
    return Compose(
        [*steps[:resize], partial(_resize_transform, step=steps[resize], decoder=decoder), *steps[resize + 1 :]]
    )


def _resize_transform(image: Image.Image | torch.Tensor, step: Resize | ResizeKeepRatio, decoder: str) -> torch.Tensor:
    """Resize an image, or a batch of them, to the size that this step of the reference would give."""
    height, width = F.get_size(image)
    if isinstance(step, ResizeKeepRatio):
        size = step.get_params(SimpleNamespace(size=(width, height)), step.size, step.longest)
    elif isinstance(step.size, int):
        size = [int(step.size * side / min(height, width)) for side in (height, width)]
    else:
        size = step.size
    if isinstance(image, torch.Tensor):
        return resize_decoded(image, size, step.interpolation)
    return resize(image, size, decoder, step.interpolation)


def size_for_crops(width: int, height: int, preprocess: dict) -> tuple[int, int]:
    """(height, width) of an image that is stored for random crops: never enlarged, with the same aspect ratio."""
    short = min(width, height)
    stored = min(short, math.ceil(max(model_size(preprocess)) * SPARE))
    return round(height * stored / short), round(width * stored / short)


def interpolation_mode(preprocess: dict) -> InterpolationMode:
    """The model's interpolation; open_clip's "random" is bicubic here."""
    is_bilinear = preprocess.get("interpolation") == "bilinear"
    return InterpolationMode.BILINEAR if is_bilinear else InterpolationMode.BICUBIC


def model_size(preprocess: dict) -> tuple[int, int]:
    """(height, width) of the model's input."""
    size = preprocess["size"]
    return (size, size) if isinstance(size, int) else (size[0], size[-1])
