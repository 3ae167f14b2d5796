"""From an image to what the model sees.

open_clip's own evaluation transform is the reference. Its resizing and cropping run where the image is loaded; the
pixels travel as uint8, and are scaled and normalised on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from open_clip.transform import MaybeToTensor, PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import Compose, InterpolationMode, Normalize, RandomResizedCrop

CROP_SCALE = (0.9, 1.0)  # share of the image's area, as in open_clip's training


def pixels(image: Image.Image) -> torch.Tensor:
    """uint8 (3, height, width) of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def evaluation_transform(preprocess: dict) -> Callable[[Image.Image], torch.Tensor]:
    """The resizing and cropping of open_clip's evaluation transform: RGB image to uint8 (3, height, width)."""
    reference = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    return Compose([t for t in reference.transforms if not isinstance(t, (MaybeToTensor, Normalize))] + [pixels])


class CropTransform:
    """A random crop of 90 to 100 % of the image, brought to the model's size. No flip: captions say left and right."""

    def __init__(self, preprocess: dict):
        size = preprocess["size"]
        self._crop = RandomResizedCrop(size, scale=CROP_SCALE, interpolation=InterpolationMode.BICUBIC)

    def __call__(self, image: Image.Image, seed: int) -> torch.Tensor:
        """uint8 (3, height, width). The same seed gives the same crop, in whatever process."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return pixels(self._crop(image))
