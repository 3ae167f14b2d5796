"""Configs and preprocessing of transformers' CLIP models, as open_clip's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clip_retrieval.errors import UserError
from clip_retrieval.models import chinese_clip, config_schema
from clip_retrieval.models.hugging_face import read_model_json
from clip_retrieval.models.libraries import translate_errors
from clip_retrieval.models.model_config import Config, find_preprocess
from clip_retrieval.models.siglip_model import TIMM_MODEL

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
CLIP_VOCABULARY = 49408
SIGLIP_TOKENIZERS = {32000: "timm/ViT-B-16-SigLIP", 256000: "timm/ViT-B-16-SigLIP2"}
"""Hub names of the tokenizers of SigLIP and SigLIP 2, by the size of their vocabulary."""

CLEANING = {
    "SiglipTokenizer": "canonicalize",
    **dict.fromkeys(("GemmaTokenizer", "GemmaTokenizerFast", "Siglip2Tokenizer"), "lower"),
}
"""Cleaning of captions that SigLIP's tokenizers do by themselves only in some versions of transformers."""

TANH = {"approximate": "tanh"}
ACTIVATIONS = {"gelu": None, "quick_gelu": None, "gelu_pytorch_tanh": TANH, "gelu_new": TANH}
"""Names of transformers, and open_clip's `act_kwargs`."""

TIMM_ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
HALF = [0.5, 0.5, 0.5]
SIGLIP_PREPROCESS = {"mean": HALF, "std": HALF, "interpolation": "bicubic", "resize_mode": "squash"}
EPS = 1e-5
"""Of torch's layer norms."""

BERT_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob"),
)


def read_transformers_folder(folder: Path) -> tuple[Config, Config]:
    """Read the model config and the preprocessing of a folder that transformers saved, in open_clip's form.

    Raises UserError, naming the file, if it is damaged, or a model that is not supported.
    """
    path = folder / "config.json"
    content = read_model_json(path, "config of transformers")
    kind: Any = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in MODELS:
        raise UserError(f"{path}: model_type {kind!r} is not supported; the supported ones are {', '.join(MODELS)}")
    preprocessing = _read_preprocessing(folder)
    with translate_errors(f"{path} cannot be used", "give another model"):
        _refuse_unsupported(content, preprocessing, path)
        config = MODELS[kind](_parse(kind, content))
        _choose_tokenizer(config["text_cfg"], folder)
        config_schema.model_config(config, "")
    defaults = {"clip": {}, "chinese_clip": chinese_clip.PREPROCESS}.get(kind, SIGLIP_PREPROCESS)
    with translate_errors(f"the preprocessing in {folder} cannot be used", "give another folder"):
        return config, find_preprocess(defaults | _convert_preprocessing(preprocessing, config))


def _parse(kind: str, content: Config) -> Any:
    """Complete a config.json with the defaults of transformers."""
    from transformers import CONFIG_MAPPING

    kind = {"siglip2": "siglip"}.get(kind, kind)  # the same fields but for the patches
    return CONFIG_MAPPING[kind].from_dict({**content, "model_type": kind})


def _refuse_unsupported(content: Config, preprocessing: Config, path: Path) -> None:
    """Raise UserError for variants of a model that open_clip's modules do not compute."""
    vision, text = content.get("vision_config") or {}, content.get("text_config") or {}
    if any(part.get("pruned_heads") for part in (content, vision, text)):
        raise UserError(f"{path}: attention heads are pruned, which is not supported; give the whole model")
    if vision.get("num_channels", 3) != 3:
        raise UserError(f"{path}: the images have {vision['num_channels']} channels; only RGB is supported")
    if vision.get("vision_use_head") is False:
        raise UserError(f"{path}: the image tower has no pooling head (vision_use_head), which is not supported")
    if content["model_type"] == "siglip2":
        if "max_num_patches" in preprocessing or "image_size" not in vision:
            raise UserError(
                f"{path} is a NaFlex SigLIP 2, whose images have varying shapes: not supported; give a SigLIP 2 of a "
                "fixed resolution"
            )
        if (vision["image_size"] // vision.get("patch_size", 16)) ** 2 != vision.get("num_patches", 256):
            raise UserError(f"{path}: image_size does not fit num_patches; give a SigLIP 2 of a fixed resolution")


def _clip(parsed: Any) -> Config:
    vision, text = parsed.vision_config, parsed.text_config
    text_cfg = _text_cfg(text)
    # transformers pools the largest id if eos_token_id is 2, as the first configs had it, or else the first such id
    if text.eos_token_id not in (2, text.vocab_size - 1):
        text_cfg |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    return {
        "embed_dim": parsed.projection_dim,
        "quick_gelu": _quick_gelu(vision, text),
        "vision_cfg": _vision_cfg(vision),
        "text_cfg": text_cfg,
    }


def _siglip(parsed: Any) -> Config:
    vision, text = parsed.vision_config, parsed.text_config
    sizes = {
        "img_size": _side(vision.image_size),
        "patch_size": _side(vision.patch_size),
        "embed_dim": vision.hidden_size,
        "depth": vision.num_hidden_layers,
        "num_heads": vision.num_attention_heads,
        "mlp_ratio": _mlp_ratio(vision),
        "act_layer": _activation(vision, TIMM_ACTIVATIONS),
        "eps": vision.layer_norm_eps,
    }
    return {
        "embed_dim": vision.hidden_size,
        "init_logit_bias": -10,
        "quick_gelu": text.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": sizes["img_size"],
            "timm_model_name": TIMM_MODEL,
            "timm_pool": "map",
            "timm_proj": "none",
            "timm_kwargs": sizes,
        },
        "text_cfg": _text_cfg(text) | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    }


def _chinese_clip(parsed: Any) -> Config:
    vision, text = parsed.vision_config, parsed.text_config
    hf_config = {name: getattr(text, name) for name in BERT_FIELDS}
    config = chinese_clip.make_config(parsed.projection_dim, _vision_cfg(vision), hf_config)
    return config | {"quick_gelu": _quick_gelu(vision)}


MODELS = {"clip": _clip, "siglip": _siglip, "siglip2": _siglip, "chinese_clip": _chinese_clip}


def _vision_cfg(vision: Any) -> Config:
    """Return the `vision_cfg` of OpenAI's ViT."""
    return {
        "image_size": _side(vision.image_size),
        "layers": vision.num_hidden_layers,
        "width": vision.hidden_size,
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "patch_size": _side(vision.patch_size),
        **_block_cfg(vision),
    }


def _text_cfg(text: Any) -> Config:
    """Return the `text_cfg` of open_clip's transformer."""
    return {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        **_block_cfg(text),
    }


def _block_cfg(tower: Any) -> Config:
    """Return the fields of a transformer's blocks that differ from open_clip's defaults."""
    fields: Config = {}
    if (ratio := _mlp_ratio(tower)) != 4:
        fields["mlp_ratio"] = ratio
    if tower.layer_norm_eps != EPS:
        fields["norm_kwargs"] = {"eps": tower.layer_norm_eps}
    if arguments := _activation(tower, ACTIVATIONS):
        fields["act_kwargs"] = arguments
    return fields


def _mlp_ratio(tower: Any) -> float:
    """Return the ratio whose product with the width is the MLP's width, after int()."""
    ratio = tower.intermediate_size / tower.hidden_size
    is_exact = int(tower.hidden_size * ratio) == tower.intermediate_size
    return ratio if is_exact else (tower.intermediate_size + 0.5) / tower.hidden_size


def _activation(tower: Any, known: dict[str, Any]) -> Any:
    if tower.hidden_act not in known:
        raise ValueError(f"hidden_act is {tower.hidden_act}; the supported ones are {', '.join(known)}")
    return known[tower.hidden_act]


def _quick_gelu(*towers: Any) -> bool:
    found = {tower.hidden_act == "quick_gelu" for tower in towers}
    if len(found) > 1:
        raise ValueError("only one of the towers has the hidden_act quick_gelu")
    return found.pop()


def _side(size: Any) -> int:
    """Return the side of a square size, given as one number or two."""
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    if height != width:
        raise ValueError(f"{height} x {width} pixels; only squares are supported")
    return height


def _choose_tokenizer(text: Config, folder: Path) -> None:
    """Add the source of the tokenizer to a `text_cfg`: the folder, or else the known one of such a vocabulary."""
    path = folder / "tokenizer_config.json"
    settings = read_model_json(path, "tokenizer config") if path.exists() else {}
    has_own = any((folder / name).exists() for name in TOKENIZER_FILES)
    default = text.get("hf_tokenizer_name")
    if text.get("pool_type") == "last":
        default = SIGLIP_TOKENIZERS.get(text["vocab_size"])
        if clean := CLEANING.get(settings.get("tokenizer_class", "SiglipTokenizer" if not has_own else "")):
            text["tokenizer_kwargs"] = {"clean": clean}
    elif not default and text["vocab_size"] == CLIP_VOCABULARY and (not has_own or _has_clip_vocabulary(folder)):
        return  # CLIP's own
    text["hf_tokenizer_name"] = str(folder) if has_own or not default else default


def _has_clip_vocabulary(folder: Path) -> bool:
    """Whether the vocabulary of a folder's tokenizer is OpenAI's."""
    from open_clip.tokenizer import SimpleTokenizer

    if (path := folder / "vocab.json").exists():
        vocabulary = read_model_json(path, "vocabulary")
    else:
        content = read_model_json(folder / "tokenizer.json", "tokenizer")
        vocabulary = content.get("model", {}).get("vocab")
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return vocabulary == {special.get(word, word): number for word, number in SimpleTokenizer().encoder.items()}


def _read_preprocessing(folder: Path) -> Config:
    """Read the settings of an image processor; empty if the folder has none."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            content = read_model_json(folder / name, "config of an image processor")
            content = content.get("image_processor", content) if isinstance(content, dict) else None
            if not isinstance(content, dict):
                raise UserError(f"{folder / name} is not a config of an image processor; give another folder")
            return content
    return {}


def _convert_preprocessing(content: Config, config: Config) -> Config:
    """Return the fields of open_clip's PreprocessCfg that an image processor sets."""
    found: Config = {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if content.get(theirs) is not None:
            found[ours] = content[theirs]
    if content.get("do_normalize") is False:
        found |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    if content.get("do_rescale") is False or abs(content.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise ValueError("pixels are not scaled to 0 to 1")

    # interpolation
    if (resample := content.get("resample")) is not None:
        if resample not in INTERPOLATIONS:
            raise ValueError(f"resample is {resample}; only 2 (bilinear) and 3 (bicubic) are supported")
        found["interpolation"] = INTERPOLATIONS[resample]

    # size and crop
    size, crop = content.get("size"), content.get("crop_size")
    if size is not None:
        is_square = isinstance(size, dict) and "height" in size
        short = _side((size["height"], size["width"])) if is_square else _shortest(size)
        crops = content.get("do_center_crop", not is_square)
        final = _shortest(crop) if crops and crop is not None else short
        found["resize_mode"] = "squash" if is_square else "shortest"
        expected = config["vision_cfg"]["image_size"]
        if final != expected or short < final:
            raise ValueError(f"images are resized to {short} and cropped to {final}, but the model's are {expected}")
        found |= {"size": final} | ({"resize_size": short} if short > final else {})
    return found


def _shortest(size: Any) -> Any:
    """Return the side of a square, or of the shortest edge."""
    if not isinstance(size, dict):
        return size
    return size.get("shortest_edge", size.get("height"))
