"""Small random models for tests: open_clip's own classes, a few thousand parameters."""

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.hf_model import HFTextEncoder

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


SOT, EOT = 49406, 49407


def token_ids(lengths, context=16):
    """Make token ids like CLIP's tokenizer; the first caption is all "!", whose id is also the padding's."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(len(lengths), context, dtype=torch.long)
    for row, length in enumerate(lengths):
        words = torch.randint(1, 49000, (length - 2,), generator=generator)
        ids[row, :length] = torch.tensor([SOT, *(words * (row > 0)).tolist(), EOT])
    return ids


TIMM = {
    "timm": {"timm_model_name": "test_resnet", "timm_proj": "linear", "image_size": 64},
    "timm mlp": {"timm_model_name": "test_convnext", "timm_proj": "mlp"},
    "eva": {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None, "image_size": 224},
    "mobileclip": {"timm_model_name": "fastvit_t8", "timm_pool": "avg", "timm_proj": None},
    "mobileclip-b": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None},
    "pe": {"timm_model_name": "vit_pe_core_tiny_patch16_384", "timm_pool": "map", "timm_proj": None, "image_size": 384},
    "siglip": {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
    "abs_attn": {"timm_model_name": "resnet10t", "timm_pool": "abs_attn", "timm_proj": ""},
    "rot_attn": {"timm_model_name": "resnet10t", "timm_pool": "rot_attn", "timm_proj": "none"},
    "attn and linear": {"timm_model_name": "resnet10t", "timm_pool": "abs_attn", "timm_proj": "linear"},
}
"""Image towers of timm, one for each way in which open_clip ends them."""


def small_towers(kind):
    """A small CLIP of a kind of towers, and its image size."""
    if kind in TIMM:
        vision = {"timm_model_pretrained": False, "image_size": 160} | TIMM[kind]
        dim = 64 if kind == "siglip" else 24  # without a projection, the width of the tower
        return small_clip(custom_text=True, vision_cfg=vision, embed_dim=dim), vision["image_size"]
    if kind == "hugging face":
        from transformers import BertConfig

        clip = small_clip(custom_text=True)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        config = BertConfig(vocab_size=49408, **sizes)
        clip.text = HFTextEncoder("bert", 24, config, pooler_type="mean_pooler", proj_type="mlp").eval()
        return clip, 16
    if kind == "simple-clip":
        return small_simple_clip(vocabulary=49408, dim=32), 32
    if kind == "coca":
        text = TEXT | {"embed_cls": True, "output_tokens": True}
        small = small_config(text_cfg=text, multimodal_cfg=TEXT | {"attn_pooler_heads": 2})
        small["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
        coca = open_clip.CoCa(**small).eval()
        torch.nn.init.normal_(coca.text_decoder.text_projection)  # open_clip leaves it uninitialised
        return coca, 16
    return small_clip(resnet=kind == "resnet", custom_text=kind == "custom text"), 32 if kind == "resnet" else 16


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
