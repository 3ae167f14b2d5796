"""Weights of transformers' CLIPModel, SiglipModel, Siglip2Model and ChineseCLIPModel under open_clip's names."""

from __future__ import annotations

import torch

from clip_retrieval.models.model_config import State

_JOINED = ("q_proj", "k_proj", "v_proj")

# parts of names, replaced in this order
_LAYERS = {
    "encoder.layers.": "transformer.resblocks.",
    "self_attn.": "attn.",
    "layer_norm": "ln_",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
_VIT = {
    "vision_model.": "visual.",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.": "conv1.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.": "ln_pre.",
    "post_layernorm.": "ln_post.",
    **_LAYERS,
}
_TEXT = {
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    **_LAYERS,
}
_TIMM = {
    "vision_model.": "visual.trunk.",
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "embeddings.position_embedding.weight": "pos_embed",
    "post_layernorm.": "norm.",
    "head.probe": "attn_pool.latent",
    "head.attention.out_proj.": "attn_pool.proj.",
    "head.layernorm.": "attn_pool.norm.",
    "head.mlp.": "attn_pool.mlp.",
    "encoder.layers.": "blocks.",
    "self_attn.in_proj_": "attn.qkv.",
    "self_attn.out_proj.": "attn.proj.",
    "layer_norm": "norm",
}
_BERT = {"text_model.": "text.transformer."}


def to_open_clip(state: State) -> State:
    """Rename a state dict to open_clip's names. Raises KeyError if a part of an attention is missing."""
    unused = ("position_ids", "text_model.pooler.dense.weight", "text_model.pooler.dense.bias")
    state = _join_attention({name: value for name, value in state.items() if not name.endswith(unused)})
    is_siglip, is_bert = "vision_model.head.probe" in state, "text_model.embeddings.word_embeddings.weight" in state
    if is_siglip:
        _prepare_siglip(state)
    else:
        state["visual.proj"] = state.pop("visual_projection.weight").t().contiguous()
        projection = state.pop("text_projection.weight")
        state |= {"text.proj.weight": projection} if is_bert else {"text_projection": projection.t().contiguous()}
    text = _BERT if is_bert else {"text_model.": "text." * is_siglip, "text.head.": "text.text_projection.", **_TEXT}
    parts = {"vision_model.": _TIMM if is_siglip else _VIT, "text_model.": text}
    return {_rename(name, parts): value for name, value in state.items()}


def to_transformers(state: State, example: State) -> State:
    """Rename a state dict of open_clip to the names of `example`, one of the same model in transformers.

    The inverse of `to_open_clip`. Raises ValueError if the models have different weights.
    """
    example = {name: value for name, value in example.items() if value.is_floating_point()}
    # `to_open_clip` moves each number to one place, so the transpose of it, which autograd computes, is its inverse
    converted, invert, *_ = torch.func.vjp(to_open_clip, example)
    own = {name.removeprefix("text."): value for name, value in state.items() if value.is_floating_point()}
    own.setdefault("logit_bias", torch.zeros(1))
    names = {name: name.removeprefix("text.") for name in converted}
    if differing := (own.keys() ^ set(names.values())) - {"logit_bias"}:
        raise ValueError(f"other weights: {', '.join(sorted(differing)[:3])}")
    (found,) = invert({name: own[short].view_as(converted[name]) for name, short in names.items()})
    return found


def _join_attention(state: State) -> State:
    """Join the projections of queries, keys and values, as torch's and timm's attention have them."""
    joined: State = {}
    for name, value in state.items():
        place = name.rpartition(".")[0]
        if not place.endswith(_JOINED):
            joined[name] = value
        elif place.endswith(_JOINED[0]):
            parts = [name.replace(_JOINED[0], part) for part in _JOINED]
            joined[name.replace("q_proj.", "in_proj_")] = torch.cat([state[part] for part in parts])
    return joined


def _prepare_siglip(state: State) -> None:
    """Change shapes to timm's: positions with a batch axis, and attention pooling with queries apart."""
    positions, patches = "vision_model.embeddings.position_embedding.weight", state[_PATCHES]
    state[positions] = state[positions][None]
    if patches.ndim == 2:  # Siglip2Model's linear layer on the pixels of a patch: row, column, channel
        side = round((patches.shape[1] // 3) ** 0.5)
        state[_PATCHES] = patches.view(-1, side, side, 3).permute(0, 3, 1, 2).contiguous()
    for kind in ("weight", "bias"):
        query, *key_value = state.pop(f"vision_model.head.attention.in_proj_{kind}").chunk(3)
        state[f"visual.trunk.attn_pool.q.{kind}"] = query.clone()
        state[f"visual.trunk.attn_pool.kv.{kind}"] = torch.cat(key_value)


_PATCHES = "vision_model.embeddings.patch_embedding.weight"


def _rename(name: str, parts: dict[str, dict[str, str]]) -> str:
    for prefix, replacements in parts.items():
        if name.startswith(prefix):
            for old, new in replacements.items():
                name = name.replace(old, new, 1)
            return name
    return name
