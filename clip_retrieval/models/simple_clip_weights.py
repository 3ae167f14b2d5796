"""simple-clip: its checkpoints, and the initial weights of its towers.

The models are `resnet18`, `resnet50` and `efficientnet_v2_s` in configs/; the code is in simple_clip_model. simple-clip
resizes images to the square and scales them to [0, 1] without normalising. Models trained here crop them and use
ImageNet's mean and standard deviation. https://github.com/filipbasara0/simple-clip
"""

from __future__ import annotations

import torch

from clip_retrieval.errors import UserError
from clip_retrieval.models import names
from clip_retrieval.models.model_config import Config, State, count_layers, find_model_config

IMAGE_MODELS = ("resnet18", "resnet50", "efficientnet_v2_s")
TEXT_MODEL = "distilbert-base-uncased"
HEAD_WIDTH = 64

PREPROCESS = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
"""Preprocessing of simple-clip's own checkpoints."""

HIGHEST_BIAS = -1.0
"""All checkpoints have a bias. A bias above this was not trained: SigLIP's starts at -10 and stays far below 0;
InfoNCE's starts at 0, and only rounding changes it."""

IMAGE, TRUNK, TEXT = "image_encoder.", "visual.trunk.", "text.transformer."
RENAMED = {
    "text_encoder.model.": TEXT,
    "image_projection.": "visual.head.",
    "projection_head.": "visual.head.",  # until 2024; then its captions had no head, and there was no temperature
    "text_projection.": "text.proj.",
    "t_prime": "logit_scale",
    "b": "logit_bias",
}
RESNET_PARTS = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
EFFICIENTNET_PARTS = {"0": "features"}
BLOCKS: dict[tuple[int, ...], str] = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet50"}


def is_reference(state: State) -> bool:
    """Whether a state dict has simple-clip's own names."""
    return all(any(name.startswith(prefix) for name in state) for prefix in (IMAGE, "text_encoder.model."))


def to_open_clip(state: State) -> State:
    """Rename simple-clip's own state dict to our names, without an untrained bias (see HIGHEST_BIAS).

    The first checkpoints, among them the published one, have no temperature: they were trained with a scale of 1.
    """
    parts = RESNET_PARTS if any(name.startswith(f"{IMAGE}4.") for name in state) else EFFICIENTNET_PARTS
    renames = {f"{IMAGE}{number}.": f"{TRUNK}{part}." for number, part in parts.items()} | RENAMED
    renamed = {}
    for name, value in state.items():
        prefix = next((p for p in renames if name == p or (p.endswith(".") and name.startswith(p))), "")
        renamed[renames.get(prefix, "") + name.removeprefix(prefix)] = value
    if "logit_bias" in renamed and renamed["logit_bias"] > HIGHEST_BIAS:
        del renamed["logit_bias"]
    if any(name.startswith("projection_head.") for name in state):
        renamed.setdefault("logit_scale", torch.tensor(0.0))
    return renamed


def infer(state: State, source: str) -> tuple[str, Config]:
    """Infer the model name and config of a checkpoint from the shapes of its tensors (under our names).

    Raises UserError, naming `source`, if one of these tensors is missing.
    """
    blocks = tuple(count_layers(state, f"{TRUNK}layer{stage}.") for stage in (1, 2, 3, 4))
    name = "efficientnet_v2_s" if f"{TRUNK}features.0.0.weight" in state else BLOCKS.get(blocks)
    if name is None or (f"{TRUNK}layer1.0.conv3.weight" in state) != (name == "resnet50"):
        raise UserError(f"{source} is an incomplete simple-clip checkpoint: it has no {', '.join(IMAGE_MODELS)}")
    config, _ = find_model_config(names.resolve(name))
    text = config["text_cfg"]
    try:
        vocabulary, width = state[f"{TEXT}embeddings.word_embeddings.weight"].shape
        positions = state[f"{TEXT}embeddings.position_embeddings.weight"].shape[0]
        config["embed_dim"] = state["visual.head.2.weight"].shape[0]
        if "text.proj.0.weight" not in state:
            text["proj_type"] = "none"
        text["context_length"] = min(text["context_length"], positions)
        text["hf_config"] |= {
            "vocab_size": vocabulary,
            "max_position_embeddings": positions,
            "dim": width,
            "hidden_dim": state[f"{TEXT}transformer.layer.0.ffn.lin1.weight"].shape[0],
            "n_layers": count_layers(state, f"{TEXT}transformer.layer."),
            "n_heads": width // HEAD_WIDTH,
        }
    except KeyError as error:
        raise UserError(f"{source} is an incomplete simple-clip checkpoint: {error.args[0]} is missing") from None
    return name, config


def trunk_weights(state: State) -> State:
    """Rename a torchvision state dict to our names, without its classifier; empty for other state dicts."""
    parts = tuple(f"{part}." for part in (*RESNET_PARTS.values(), *EFFICIENTNET_PARTS.values()))
    trunk = {f"{TRUNK}{name}": value for name, value in state.items() if name.startswith(parts)}
    # Weights from before torch 0.4.1 lack the counts; nothing depends on them.
    counts = [name.replace("running_mean", "num_batches_tracked") for name in trunk if name.endswith("running_mean")]
    return {name: torch.tensor(0) for name in counts} | trunk


def distilbert_weights(state: State) -> State:
    """Rename a DistilBERT state dict to our names, without its pretraining heads; empty for other state dicts."""
    state = {name.removeprefix("distilbert."): value for name, value in state.items()}
    if not any(name.startswith("transformer.layer.") for name in state):
        return {}
    parts = ("embeddings.", "transformer.")
    return {TEXT + name: v for name, v in state.items() if name.startswith(parts) and not name.endswith("position_ids")}


def weight_tags(name: str) -> dict[str, dict[str, str]]:
    """Return torchvision's weights for an image tower in the form of open_clip's tags; none for other names."""
    from torchvision.models import get_model_weights

    return {tag.name: {"url": tag.url} for tag in get_model_weights(name)} if name in IMAGE_MODELS else {}
