"""Small random models for tests: open_clip's own classes, a few thousand parameters."""

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from clip_retrieval.models.simple_clip_model import SimpleCLIP

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


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "thing", "red", "green", "dog", "##s", "cafe", "small"]
"""A vocabulary of 13 word pieces."""


def small_simple_config(vocabulary=13, dim=64, dropout=0.0, **text):
    """A simple-clip model config: ResNet-18, the smallest trunk, and a narrow DistilBERT."""
    sizes = {"dim": dim, "hidden_dim": 48, "n_layers": 2, "n_heads": dim // 32, "max_position_embeddings": 32}
    hf_config = {"model_type": "distilbert", "vocab_size": vocabulary, "dropout": dropout, "attention_dropout": dropout}
    return {
        "embed_dim": 24,
        "vision_cfg": {"torchvision_model_name": "resnet18", "image_size": 32},
        "text_cfg": {"context_length": 16, "hf_config": hf_config | sizes, **text},
    }


def small_simple_clip(seed=0, bias=None, **sizes):
    """A random SimpleCLIP; `seed` decides its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SimpleCLIP(**small_simple_config(**sizes), init_logit_bias=bias).eval()
