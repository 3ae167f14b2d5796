"""Small random models for tests: open_clip's own classes, a few thousand parameters."""

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

VIT = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None, "image_size": 32}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


def small_config(resnet=False, **changes):
    """An open_clip model config."""
    config = {"embed_dim": 24, "vision_cfg": dict(RESNET if resnet else VIT), "text_cfg": dict(TEXT)}
    return config | changes


def small_clip(resnet=False, seed=0, custom_text=False, **changes):
    """A random open_clip CLIP (or CustomTextCLIP); `seed` decides its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
        return make(**small_config(resnet, **changes)).eval()


def small_preprocess(size=16):
    """open_clip's preprocessing for the small models."""
    return {
        "size": size,
        "mode": "RGB",
        "mean": list(OPENAI_DATASET_MEAN),
        "std": list(OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
