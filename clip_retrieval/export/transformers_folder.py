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
from torch import Tensor, nn

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

ARCHITECTURES = "it has CLIP's ViT and text transformer, SigLIP and Chinese-CLIP with a ViT"
Converted = tuple[str, Config, State]
"""Name of a model class without "Model", its config, and its state dict."""


def convert(model: ImageTextModel, state: State) -> Converted:
    """Convert a state dict of the model, also one with other shapes, and the model's config.

    Raises UserError if transformers has no such architecture.
    """
    refusal, remedy = _refuse(model)
    converter = _find_converter(model)
    if converter is None:
        raise UserError(f"{refusal}; {remedy}")
    with translate_errors(refusal, remedy):
        return converter(model, state)


def _refuse(model: ImageTextModel) -> tuple[str, str]:
    return f"{model.name}: transformers has no such architecture ({ARCHITECTURES})", "use --format open_clip"


def write(model: ImageTextModel, folder: Path, weights: State | None = None) -> None:
    """Write config.json, model.safetensors, and the files of the processor.

    weights: replace the model's own, by name.
    """
    import transformers

    kind, config, state = convert(model, model.model.clip.state_dict() | (weights or {}))
    with translate_errors(*_refuse(model)):
        built = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**config))
        built.load_state_dict(state)
    image_processor = getattr(transformers, f"{kind}ImageProcessor")(**_image_processor(model))
    tokenizer = tokenizer_files.to_transformers(model.tokenizer)
    if kind == "Siglip":
        # without a mask: SigLIP attends to padding; save_pretrained writes the arguments of the initializer
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids"]
    processor = getattr(transformers, f"{kind}Processor")(image_processor, tokenizer)
    with quiet(), _without_progress_bars():
        built.save_pretrained(folder)
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


def _find_converter(model: ImageTextModel) -> Callable[[ImageTextModel, State], Converted] | None:
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


def _clip(model: ImageTextModel, state: State) -> Converted:
    clip, tokenizer = model.model.clip, cast(SimpleTokenizer, model.tokenizer)
    text = text_part(clip)
    state = {key.removeprefix("text."): value for key, value in state.items()}
    text_config = _text_config(text) | {
        "projection_dim": embedding_dim(clip),
        "bos_token_id": tokenizer.sot_token_id,
        "eos_token_id": tokenizer.eot_token_id,
        "pad_token_id": tokenizer.eot_token_id,
    }
    config = {"text_config": text_config, "vision_config": _vision_config(clip), "projection_dim": embedding_dim(clip)}
    return (
        "CLIP",
        config,
        {
            "logit_scale": state["logit_scale"].reshape(()),
            "text_projection.weight": _projection(state, "text_projection"),
            **_clip_text(state),
            **_clip_vision(state),
        },
    )


def _chinese_clip(model: ImageTextModel, state: State) -> Converted:
    clip = model.model.clip
    hf_config = {key: value for key, value in model.config["text_cfg"]["hf_config"].items() if key != "model_type"}
    tower = "text.transformer."
    config = {"text_config": hf_config, "vision_config": _vision_config(clip), "projection_dim": embedding_dim(clip)}
    return (
        "ChineseCLIP",
        config,
        {
            "logit_scale": state["logit_scale"].reshape(()),
            "text_projection.weight": state["text.proj.weight"],
            **{f"text_model.{key.removeprefix(tower)}": v for key, v in state.items() if key.startswith(tower)},
            **_clip_vision(state),
        },
    )


def _siglip(model: ImageTextModel, state: State) -> Converted:
    clip = model.model.clip
    # the configs
    text, trunk = text_part(clip), clip.visual.trunk
    state = {key.removeprefix("text."): value for key, value in state.items()}
    text_config = _text_config(text) | {"projection_size": embedding_dim(clip)}
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
    # the weights
    return (
        "Siglip",
        {"text_config": text_config, "vision_config": vision_config},
        {
            "logit_scale": state["logit_scale"].reshape(1),
            "logit_bias": state.get("logit_bias", torch.zeros(1)).reshape(1),
            "text_model.head.weight": _projection(state, "text_projection"),
            "text_model.head.bias": state["text_projection.bias"],
            **_clip_text(state),
            **_siglip_vision(state),
        },
    )


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


def _projection(state: State, name: str) -> Tensor:
    """Return the weight (dim, width) of a projection: a matrix (width, dim) or a linear layer."""
    return state[f"{name}.weight"] if f"{name}.weight" in state else state[name].T.contiguous()


def _clip_text(state: State) -> State:
    return {
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.final_layer_norm.weight": state["ln_final.weight"],
        "text_model.final_layer_norm.bias": state["ln_final.bias"],
        **_blocks(state, "transformer.resblocks.", "text_model.encoder.layers.", _CLIP_BLOCK),
    }


def _clip_vision(state: State) -> State:
    names = {
        "class_embedding": "embeddings.class_embedding",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_pre.weight": "pre_layrnorm.weight",
        "ln_pre.bias": "pre_layrnorm.bias",
        "ln_post.weight": "post_layernorm.weight",
        "ln_post.bias": "post_layernorm.bias",
    }
    return {
        "visual_projection.weight": _projection(state, "visual.proj"),
        **{f"vision_model.{name}": state[f"visual.{own}"] for own, name in names.items()},
        **_blocks(state, "visual.transformer.resblocks.", "vision_model.encoder.layers.", _CLIP_BLOCK),
    }


def _siglip_vision(state: State) -> State:
    trunk, target = "visual.trunk.", "vision_model."
    names = {
        "patch_embed.proj": "embeddings.patch_embedding",
        "norm": "post_layernorm",
        "attn_pool.proj": "head.attention.out_proj",
        "attn_pool.norm": "head.layernorm",
        "attn_pool.mlp.fc1": "head.mlp.fc1",
        "attn_pool.mlp.fc2": "head.mlp.fc2",
    }
    converted = {
        f"{target}embeddings.position_embedding.weight": state[f"{trunk}pos_embed"][0],
        f"{target}head.probe": state[f"{trunk}attn_pool.latent"],
    }
    for kind in ("weight", "bias"):
        converted |= {f"{target}{name}.{kind}": state[f"{trunk}{own}.{kind}"] for own, name in names.items()}
        query, key_value = (state[f"{trunk}attn_pool.{part}.{kind}"] for part in ("q", "kv"))
        converted[f"{target}head.attention.in_proj_{kind}"] = torch.cat([query, key_value])
    return converted | _blocks(state, f"{trunk}blocks.", f"{target}encoder.layers.", _TIMM_BLOCK)


_CLIP_BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "attn.in_proj_": "qkv",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_TIMM_BLOCK = {
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "attn.proj.": "self_attn.out_proj.",
    "attn.qkv.": "qkv",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
}
"""Names of the parts of a block, in open_clip or timm and in transformers."""


def _blocks(state: State, source: str, target: str, names: dict[str, str]) -> State:
    """Rename the blocks of a transformer, and split their fused projections of queries, keys and values.

    A part that is not in `names` keeps its name, so that the strict loading refuses it.
    """
    converted: State = {}
    for key, value in state.items():
        if not key.startswith(source):
            continue
        number, _, part = key.removeprefix(source).partition(".")
        own = next((own for own in names if part.startswith(own)), "")
        new, kind = names.get(own, ""), part.removeprefix(own)
        if new == "qkv":
            for letter, chunk in zip("qkv", value.chunk(3)):
                converted[f"{target}{number}.self_attn.{letter}_proj.{kind}"] = chunk.contiguous()
        else:
            converted[f"{target}{number}.{new}{kind}"] = value
    return converted
