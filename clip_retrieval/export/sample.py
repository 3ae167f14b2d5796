"""Random images and texts with their features, to compare an exported model with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_retrieval.api import ImageTextModel
from clip_retrieval.data.captions import Tokens, tokenize
from clip_retrieval.data.pixels.pixels import ImageTransform
from clip_retrieval.errors import UserError

IMAGE_SIZES = ((97, 64), (60, 131), (80, 80))  # width, height
TEXTS = ("a photo of two dogs.", "It's a cat, at 10 o'clock; a bird", "一只红色的鸟", "a")
TOLERANCE = 1e-4
"""Largest difference of an element of L2-normalised features. Two float32 implementations differ by about 1e-6."""
PIXEL_TOLERANCE = 0.05
"""Mean difference of normalised pixels: three grey levels. Resizing differs by one level between libraries."""


@dataclass(frozen=True)
class Sample:
    """Inputs and features of the model that is exported.

    Attributes:
        images, texts: the inputs.
        resized: uint8 (images, 3, height, width), after resizing and cropping.
        pixels: float32, the same normalised: open_clip's input.
        tokens: token ids of the texts.
        image_features, text_features: float32 (images, dim) and (texts, dim), L2-normalised.
    """

    images: list[Image.Image]
    texts: list[str]
    resized: Tensor
    pixels: Tensor
    tokens: Tokens
    image_features: Tensor
    text_features: Tensor


@dataclass(frozen=True)
class Exported:
    """The features of a sample by an exported model.

    Attributes:
        image_features, text_features: (images, dim) and (texts, dim), from the pixels and ids of the sample; they need
            not be normalised.
        pixels: (images, 3, height, width) of the images by the exported preprocessing, if there is one.
        ids: (texts, length) of the texts by the exported tokenizer, if there is one.
    """

    image_features: Tensor
    text_features: Tensor
    pixels: Tensor | None = None
    ids: Tensor | None = None


@torch.inference_mode()
def make_sample(model: ImageTextModel) -> Sample:
    """Encode random images, smooth as photographs are, and a few texts."""
    rng = np.random.default_rng(0)
    grids = [Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)) for _ in IMAGE_SIZES]
    images = [grid.resize(size, Image.Resampling.BICUBIC) for grid, size in zip(grids, IMAGE_SIZES)]
    resize = ImageTransform(model.model.preprocess)
    resized = torch.stack([resize(image) for image in images])
    pixels = torch.stack([model.preprocess(image) for image in images])
    tokens = tokenize(TEXTS, model.tokenizer)
    ids = tokens.ids.long()
    features = model.model.encode_image(resized), model.model.encode_text(ids, tokens.lengths)
    return Sample(images, list(TEXTS), resized, pixels, Tokens(ids, tokens.lengths, tokens.cut), *features)


def compare(sample: Sample, exported: Exported, source: str) -> float:
    """Return the largest difference of the features.

    Raises UserError, naming `source`, if an exported model, preprocessing or tokenizer differs.
    """
    differences = {}
    for name in ("image_features", "text_features"):
        own, other = getattr(sample, name), getattr(exported, name)
        other = torch.nn.functional.normalize(other.float(), dim=-1)
        differences[name] = float((own - other).abs().max()) if own.shape == other.shape else float("inf")
    problems = [f"{name} differ by {value:.1g}" for name, value in differences.items() if not value <= TOLERANCE]
    if (pixels := exported.pixels) is not None:
        has_shape = pixels.shape == sample.pixels.shape
        if not has_shape or not float((sample.pixels - pixels).abs().mean()) <= PIXEL_TOLERANCE:
            problems.append("it resizes images in another way")
    if exported.ids is not None:
        # before the padding
        rows = zip(sample.tokens.ids, sample.tokens.lengths.tolist(), exported.ids, strict=True)
        if not all(torch.equal(own[:length], found[:length]) for own, length, found in rows):
            problems.append("its tokenizer gives other ids")
    if problems:
        raise UserError(
            f"{source}: this format cannot hold the model ({', '.join(problems)}); nothing was written; choose another "
            "--format"
        )
    return max(differences.values())
