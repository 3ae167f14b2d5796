"""A folder that CLIPModel, SiglipModel or ChineseCLIPModel of transformers reads, with its processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import VisionTransformer
from torch import nn

from clip_retrieval.api import ImageTextModel
from clip_retrieval.data.pixels.transforms import RESIZE_SIZE
from clip_retrieval.errors import UserError
from clip_retrieval.export import tokenizer_files
from clip_retrieval.export.sample import Exported, Sample
from clip_retrieval.models.chinese_clip import is_chinese_clip
from clip_retrieval.models.image_size import height_and_width
from clip_retrieval.models.libraries import quiet, translate_errors
from clip_retrieval.models.model_config import ClipModule, Config, State
from clip_retrieval.models.projection import embedding_dim, text_part
from clip_retrieval.models.transformers_weights import to_transformers

ARCHITECTURES = "it has CLIP's ViT and text transformer, SigLIP and Chinese-CLIP with a ViT"
Converted = tuple[str, Config]
"""Name of a model class without "Model", and its config."""


def build(model: ImageTextModel, state: State) -> tuple[str, nn.Module]:
    """Build the model in transformers with the weights of `state`; return its class without "Model", and the model.

    Raises UserError if transformers has no such architecture.
    """
    import transformers

    problem = f"{model.name}: transformers has no such architecture ({ARCHITECTURES})"
    remedy = "use --format open_clip"
    make_config = _find_config(model)
    if make_config is None:
        raise UserError(f"{problem}; {remedy}")
    with translate_errors(problem, remedy):
        kind, config = make_config(model)
        built = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**config))
        example = built.state_dict()
        built.load_state_dict(example | to_transformers(state, example))
    return kind, built


def write(model: ImageTextModel, folder: Path, weights: State | None = None) -> None:
    """Write config.json, model.safetensors, and the files of the processor.

    weights: replace the model's own, by name.
    """
    import transformers

    kind, built = build(model, model.model.clip.state_dict() | (weights or {}))
    image_processor = getattr(transformers, f"{kind}ImageProcessor")(**_image_processor(model))
    tokenizer = tokenizer_files.to_transformers(model.tokenizer)
    if kind == "Siglip":
        # without a mask: SigLIP attends to padding; save_pretrained writes the arguments of the initializer
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids"]
    processor = getattr(transformers, f"{kind}Processor")(image_processor, tokenizer)
    with quiet(), _without_progress_bars():
        cast(Any, built).save_pretrained(folder)
        processor.save_pretrained(folder)
        image_processor.save_pretrained(folder)  # transformers before 5 reads it from a file of its own


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def read(folder: Path, sample: Sample, adapt: Callable[[nn.Module], nn.Module] = lambda model: model) -> Exported:
    """Compute the features with transformers, after `adapt` has changed the model."""
    from transformers import AutoModel, AutoProcessor

    with quiet(), _without_progress_bars(), torch.inference_mode():
        model: Any = adapt(AutoModel.from_pretrained(folder, trust_remote_code=False)).eval()
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        inputs = processor(
            images=sample.images, text=sample.texts, return_tensors="pt", padding="max_length", truncation=True
        )
        mask = {"attention_mask": inputs["attention_mask"]} if "attention_mask" in inputs else {}
        images = model.get_image_features(pixel_values=sample.pixels).pooler_output
        texts = model.get_text_features(input_ids=inputs["input_ids"], **mask).pooler_output
    return Exported(images, texts, pixels=inputs["pixel_values"], ids=inputs["input_ids"])


def _find_config(model: ImageTextModel) -> Callable[[ImageTextModel], Converted] | None:
    visual, text = model.model.clip.visual, text_part(model.model.clip)
    if isinstance(visual, TimmModel) and hasattr(visual.trunk, "attn_pool") and not isinstance(text, HFTextEncoder):
        return _siglip
    if not isinstance(visual, VisionTransformer):
        return None
    if is_chinese_clip(model.config):
        return _chinese_clip
    return _clip if isinstance(model.tokenizer, SimpleTokenizer) else None


def _image_processor(model: ImageTextModel) -> Config:
    """Return the arguments of an image processor."""
    preprocess = model.model.preprocess
    height, width = height_and_width(preprocess["size"])
    size = {"height": height, "width": width}
    crops = preprocess["resize_mode"] == "shortest"
    if preprocess["resize_mode"] == "longest" or (crops and height != width):
        raise UserError(
            f"{model.name}: transformers has no preprocessing that pads images or crops to {height} x {width} pixels; "
            "use --format open_clip"
        )
    return {
        "size": {"shortest_edge": preprocess.get(RESIZE_SIZE, height)} if crops else size,
        "do_center_crop": crops,
        **({"crop_size": size} if crops else {}),
        "resample": {"bilinear": 2}.get(preprocess["interpolation"], 3),  # Pillow's numbers
        "image_mean": preprocess["mean"],
        "image_std": preprocess["std"],
    }


def _clip(model: ImageTextModel) -> Converted:
    clip, tokenizer = model.model.clip, cast(SimpleTokenizer, model.tokenizer)
    text_config = _text_config(text_part(clip)) | {
        "projection_dim": embedding_dim(clip),
        "bos_token_id": tokenizer.sot_token_id,
        "eos_token_id": tokenizer.eot_token_id,
        "pad_token_id": tokenizer.eot_token_id,
    }
    return "CLIP", _pair_config(clip, text_config)


def _chinese_clip(model: ImageTextModel) -> Converted:
    hf_config = {key: value for key, value in model.config["text_cfg"]["hf_config"].items() if key != "model_type"}
    return "ChineseCLIP", _pair_config(model.model.clip, hf_config)


def _pair_config(clip: ClipModule, text_config: Config) -> Config:
    return {"text_config": text_config, "vision_config": _vision_config(clip), "projection_dim": embedding_dim(clip)}


def _siglip(model: ImageTextModel) -> Converted:
    clip = model.model.clip
    trunk = clip.visual.trunk
    block = trunk.blocks[0]
    vision_config = {
        "hidden_size": trunk.embed_dim,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": _activation(block.mlp.act),
        "layer_norm_eps": trunk.norm.eps,
        "image_size": _square(model.model.preprocess["size"]),
        "patch_size": _square(trunk.patch_embed.patch_size),
    }
    text_config = _text_config(text_part(clip)) | {"projection_size": embedding_dim(clip)}
    return "Siglip", {"text_config": text_config, "vision_config": vision_config}


def _text_config(text: ClipModule) -> Config:
    vocabulary, width = text.token_embedding.weight.shape
    return _transformer_config(text.transformer.resblocks, width, text.ln_final) | {
        "vocab_size": vocabulary,
        "max_position_embeddings": len(text.positional_embedding),
    }


def _vision_config(clip: ClipModule) -> Config:
    visual = clip.visual
    return _transformer_config(visual.transformer.resblocks, len(visual.class_embedding), visual.ln_post) | {
        "image_size": _square(visual.image_size),
        "patch_size": _square(visual.patch_size),
        "projection_dim": embedding_dim(clip),
    }


def _transformer_config(blocks: Any, width: int, norm: nn.LayerNorm) -> Config:
    return {
        "hidden_size": width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "intermediate_size": blocks[0].mlp.c_fc.out_features,
        "hidden_act": _activation(blocks[0].mlp.gelu),
        "layer_norm_eps": norm.eps,
    }


def _activation(module: nn.Module) -> str:
    if isinstance(module, nn.GELU):
        return "gelu_pytorch_tanh" if module.approximate == "tanh" else "gelu"
    return {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh", "GELU": "gelu"}[type(module).__name__]


def _square(size: int | tuple[int, int]) -> int:
    height, width = height_and_width(size)
    if height != width:
        raise ValueError(f"{height} x {width} is not square")
    return height
