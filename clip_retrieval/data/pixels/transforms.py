"""From an image to what the model sees.

open_clip's own evaluation transform is the reference. Its resizing and cropping run where the image is loaded; the
pixels travel as uint8, and are scaled and normalised on the device.

Decoder "pillow" resizes as the reference does, bit for bit. Decoder "fast" resizes the same decoded pixels to the same
sizes with torch's uint8 kernels, whose fixed-point weights differ from Pillow's by one or two grey levels. Both decode
with Pillow: that is not where the time goes (benchmarks/input.py).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial

import numpy as np
import PIL
import torch
from open_clip.transform import MaybeToTensor, PreprocessCfg, ResizeKeepRatio, image_transform_v2
from PIL import Image
from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize
from torchvision.transforms.v2 import functional as F

from clip_retrieval.data.images.decode import shorten_middle

CROP_SCALE = (0.9, 1.0)  # share of the image's area, as in open_clip's training
CROP_RATIO = (3 / 4, 4 / 3)  # width / height, torchvision's default
SPARE = 8 / 7  # short side kept for random crops, in the model's sizes: 256 for 224
PILLOW_13 = int(PIL.__version__.partition(".")[0]) >= 13


def to_tensor(image: Image.Image | np.ndarray) -> torch.Tensor:
    """uint8 (3, height, width) of an RGB image or of uint8 (height, width, 3), copied."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize(
    image: Image.Image | np.ndarray,
    size: tuple[int, int],
    decoder: str,
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
) -> torch.Tensor:
    """uint8 (3, *size) of a whole RGB image, or of uint8 (height, width, 3)."""
    height, width = size
    if decoder == "pillow":
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        return to_tensor(F.resize(image, [height, width], interpolation))
    pixels = to_tensor(image)
    # Each pass clips, so their order shows. torch's is horizontal, vertical; so is Pillow's, since 13 not for what is
    # tall in this sense (libImaging/Resample.c).
    tall = pixels.shape[1] - height > max(2 * (pixels.shape[2] - width), 0)
    if tall and PILLOW_13:
        pixels = F.resize(pixels, [height, pixels.shape[2]], interpolation, antialias=True)
    return F.resize(pixels, [height, width], interpolation, antialias=True)


def evaluation_transform(preprocess: dict, decoder: str = "pillow") -> Callable[[Image.Image], torch.Tensor]:
    """The resizing and cropping of open_clip's evaluation transform: RGB image to uint8 (3, height, width)."""
    reference = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    steps = [step for step in reference.transforms if not isinstance(step, (MaybeToTensor, Normalize))]
    if preprocess.get("resize_mode") == "longest":  # the short side would become less than a pixel
        steps.insert(0, partial(shorten_middle, longest=min(model_size(preprocess))))
    if decoder == "pillow":
        return Compose([*steps, to_tensor])
    # The reference's steps after resizing, cropping and padding, take tensors as well.
    resize = next(i for i, step in enumerate(steps) if isinstance(step, (Resize, ResizeKeepRatio)))
    return Compose([*steps[:resize], partial(_resize_transform, step=steps[resize]), *steps[resize + 1 :]])


def _resize_transform(image: Image.Image, step: Resize | ResizeKeepRatio) -> torch.Tensor:
    """uint8 (3, height, width), resized to the size that this step of the reference gives the image."""
    if isinstance(step, ResizeKeepRatio):
        size = step.get_params(image, step.size, step.longest)
    elif isinstance(step.size, int):
        short = min(image.size)
        size = [int(step.size * side / short) for side in (image.height, image.width)]
    else:
        size = step.size
    return resize(image, size, "fast", step.interpolation)


class CropTransform:
    """A random crop of 90 to 100 % of the image, brought to the model's size. No flip: captions say left and right.

    The regions are those of torchvision's RandomResizedCrop, whose own drawing takes longer than resizing them.
    """

    def __init__(self, preprocess: dict, decoder: str = "pillow"):
        self.size = model_size(preprocess)
        self.decoder = decoder
        self.interpolation = interpolation_mode(preprocess)

    def __call__(self, image: Image.Image, seed: int) -> torch.Tensor:
        """uint8 (3, height, width). The same seed gives the same crop, in whatever process."""
        left, top, right, bottom = crop_region(image.width, image.height, seed)
        return resize(image.crop((left, top, right, bottom)), self.size, self.decoder, self.interpolation)


def crop_region(width: int, height: int, seed: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random crop of an image of this size."""
    draw = random.Random(seed)
    for _ in range(10):
        area = width * height * draw.uniform(*CROP_SCALE)
        ratio = math.exp(draw.uniform(*map(math.log, CROP_RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randrange(width - w + 1), draw.randrange(height - h + 1)
            return left, top, left + w, top + h
    # None fits: the largest central one of a ratio that is allowed.
    ratio = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def size_for_crops(width: int, height: int, preprocess: dict) -> tuple[int, int]:
    """(height, width) at which an image is kept to take random crops from: never enlarged, the aspect kept."""
    short = min(width, height)
    kept = min(short, math.ceil(max(model_size(preprocess)) * SPARE))
    return round(height * kept / short), round(width * kept / short)


def interpolation_mode(preprocess: dict) -> InterpolationMode:
    """The model's way of resizing; open_clip's "random" is bicubic here."""
    is_bilinear = PreprocessCfg(**preprocess).interpolation == "bilinear"
    return InterpolationMode.BILINEAR if is_bilinear else InterpolationMode.BICUBIC


def model_size(preprocess: dict) -> tuple[int, int]:
    """(height, width) of what the model sees."""
    size = preprocess["size"]
    return (size, size) if isinstance(size, int) else (size[0], size[-1])
