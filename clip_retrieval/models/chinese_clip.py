"""Chinese-CLIP: its checkpoints and its model names.

The image tower is OpenAI's with QuickGELU. The text tower is BERT; the text feature is the projected last hidden state
of [CLS]. Yang et al., Chinese CLIP, https://arxiv.org/abs/2211.01335.
"""

from __future__ import annotations

import re
from dataclasses import replace

from clip_retrieval.errors import UserError
from clip_retrieval.models.model_config import Config, State, count_layers, same_tower
from clip_retrieval.models.names import UNNAMED
from clip_retrieval.options import ModelOptions

CONTEXT_LENGTH = 52
TOKENIZER_MODE = "chinese_clip"
HUB_TOKENIZER = "bert-base-chinese"

PREPROCESS = {"interpolation": "bicubic", "resize_mode": "squash"}

VISION_MODELS = ("ViT-B-16", "ViT-B-32", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "RN50")
TEXT_MODELS = {
    "RoBERTa-wwm-ext-base-chinese": {"hidden_size": 768, "num_hidden_layers": 12},
    "RoBERTa-wwm-ext-large-chinese": {"hidden_size": 1024, "num_hidden_layers": 24},
    "RBT3-chinese": {"hidden_size": 768, "num_hidden_layers": 3},
}
VOCABULARY = 21128
POSITIONS = 512
HEAD_WIDTH = 64


def to_open_clip(state: State) -> State:
    """Rename a Chinese-CLIP state dict to open_clip's names."""
    renamed = {
        re.sub(r"^bert\.", "text.transformer.", name): value
        for name, value in state.items()
        if not name.startswith("bert.pooler.")
    }
    if "text_projection" in renamed:
        renamed["text.proj.weight"] = renamed.pop("text_projection").t().contiguous()
    return renamed


def to_reference(state: State) -> State:
    """Rename a state dict to the names of Chinese-CLIP's own checkpoints: the inverse of `to_open_clip`."""
    renamed = {f"module.{re.sub('^text.transformer.', 'bert.', name)}": value for name, value in state.items()}
    renamed["module.text_projection"] = renamed.pop("module.text.proj.weight").t().contiguous()
    return renamed


def bert_to_open_clip(state: State) -> State:
    """Rename a BERT state dict to the text tower's names, without its heads and its unused pooler."""
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("bert.")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if name.startswith(("embeddings.", "encoder.")) and not name.endswith("position_ids"):
            renamed[f"text.transformer.{name}"] = value
    return renamed


def vision_weights(state: State) -> State:
    """Return the image tower and the logit scale of a CLIP."""
    return {name: v for name, v in state.items() if name.startswith("visual.") or name == "logit_scale"}


def infer_config(state: State, source: str) -> Config:
    """Infer the model config of a checkpoint from the shapes of its tensors (under open_clip's names).

    Raises UserError, naming `source`, if one of these tensors is missing.
    """
    try:
        embeddings = "text.transformer.embeddings."
        vocabulary, width = state[f"{embeddings}word_embeddings.weight"].shape
        layers = count_layers(state, "text.transformer.encoder.layer.")
        text = {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "intermediate_size": state["text.transformer.encoder.layer.0.intermediate.dense.weight"].shape[0],
            "max_position_embeddings": state[f"{embeddings}position_embeddings.weight"].shape[0],
            "type_vocab_size": state[f"{embeddings}token_type_embeddings.weight"].shape[0],
        }
        return make_config(state["text.proj.weight"].shape[0], _infer_vision(state), text)
    except KeyError as error:
        raise UserError(f"{source} is an incomplete Chinese-CLIP checkpoint: {error.args[0]} is missing") from None


def reference_config(vision: str, text: str) -> Config:
    """Return the model config of one of VISION_MODELS and one of TEXT_MODELS."""
    from open_clip.factory import get_model_config

    sizes = TEXT_MODELS[text]
    hf_config = {
        "vocab_size": VOCABULARY,
        **sizes,
        "intermediate_size": 4 * sizes["hidden_size"],
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
    }
    clip = get_model_config(vision)
    return make_config(clip["embed_dim"], clip["vision_cfg"], hf_config)


def model_name(config: Config) -> str:
    """Return Chinese-CLIP's name for a config (`ViT-B-16@RoBERTa-wwm-ext-base-chinese`), or UNNAMED."""
    from open_clip.factory import get_model_config

    text, vision = config["text_cfg"]["hf_model_name"], config["vision_cfg"]
    towers = {name: get_model_config(name)["vision_cfg"] for name in VISION_MODELS}
    same = [name for name in towers if same_tower(towers[name], vision)]
    if text not in TEXT_MODELS or not same:
        return UNNAMED
    # ViT-L-14 and ViT-L-14-336 differ only in the image size.
    return f"{max(same, key=lambda name: towers[name]['image_size'] == vision.get('image_size'))}@{text}"


def split_model_name(options: ModelOptions) -> ModelOptions:
    """Split a name like `ViT-B-16@RoBERTa-wwm-ext-base-chinese` into --vision_model and --text_model."""
    vision, _, text = options.vision_model.rpartition("@")
    if text not in TEXT_MODELS:
        return options
    return replace(options, vision_model=vision, text_model=options.text_model or text)


def is_chinese_clip(config: Config) -> bool:
    """Whether a model config is Chinese-CLIP's."""
    return config["text_cfg"].get("tokenizer_mode") == TOKENIZER_MODE and "hf_model_name" in config["text_cfg"]


def make_config(embed_dim: int, vision: Config, text: Config) -> Config:
    """Return the model config of an image tower (`vision_cfg`) and a BERT (fields of its own config)."""
    text = {"model_type": "bert", "num_attention_heads": text["hidden_size"] // HEAD_WIDTH, "pad_token_id": 0, **text}
    name = next((n for n, sizes in TEXT_MODELS.items() if sizes.items() <= text.items()), "bert")
    return {
        "embed_dim": embed_dim,
        "quick_gelu": True,
        "custom_text": True,
        "vision_cfg": vision,
        "text_cfg": {
            "context_length": min(CONTEXT_LENGTH, text["max_position_embeddings"]),
            "vocab_size": text["vocab_size"],
            "hf_model_name": name,
            "hf_model_pretrained": False,
            "hf_tokenizer_name": HUB_TOKENIZER,
            "tokenizer_mode": TOKENIZER_MODE,
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "hf_proj_type": "linear",
            "hf_config": text,
        },
    }


def _infer_vision(state: State) -> Config:
    if "visual.layer1.0.conv1.weight" in state:
        grid = round((len(state["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
        return {
            "image_size": 32 * grid,
            "layers": [count_layers(state, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)],
            "width": state["visual.layer1.0.conv1.weight"].shape[0],
            "patch_size": None,
        }
    width, _, _, patch = state["visual.conv1.weight"].shape
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    return {
        "image_size": patch * grid,
        "layers": count_layers(state, "visual.transformer.resblocks."),
        "width": width,
        # ViT-H has 16 heads.
        "head_width": 80 if width == 1280 else HEAD_WIDTH,
        "mlp_ratio": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
        "patch_size": patch,
    }
