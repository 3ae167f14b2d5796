"""Long-CLIP: checkpoints for long captions, and how it stretches text position embeddings (arXiv:2403.15378)."""

from __future__ import annotations

import torch

from clip_retrieval.models.model_config import Config, State
from clip_retrieval.models.names import OPENAI_NAMES

KEPT_POSITIONS = 20
"""Positions that Long-CLIP takes from `positional_embedding`; the others are in `positional_embedding_res`."""

POSITIONS, STRETCHED = "positional_embedding", "positional_embedding_res"


def stretch_positions(positions: torch.Tensor, length: int, keep: int) -> torch.Tensor:
    """Stretch position embeddings (n, width) to (length, width), keeping the first `keep` < n of them.

    The others are interpolated linearly, by 4 for Long-CLIP's 77 to 248 positions; behind the last one, they continue
    the line through the last two.
    """
    new = torch.arange(length - keep, dtype=torch.float64)
    old = keep + new * ((len(positions) - keep) / (length - keep))
    before = old.long().clamp(max=len(positions) - 2)
    share = (old - before)[:, None].to(positions)
    return torch.cat([positions[:keep], torch.lerp(positions[before], positions[before + 1], share)])


def to_open_clip(state: State) -> State:
    """Merge Long-CLIP's two tables of position embeddings as its encode_text does."""
    positions = torch.cat([state[POSITIONS][:KEPT_POSITIONS], state[STRETCHED][KEPT_POSITIONS:]])
    return {name: value for name, value in state.items() if name != STRETCHED} | {POSITIONS: positions}


def infer(state: State, source: str) -> tuple[str, Config]:
    """Infer model name and config of a state dict: OpenAI's CLIP with these towers, and more positions.

    Raises ValueError if OpenAI has no such CLIP.
    """
    from open_clip.factory import get_model_config

    width, _, patch, _ = state["visual.conv1.weight"].shape
    patches = len(state["visual.positional_embedding"]) - 1
    for name, config_name in OPENAI_NAMES.items():
        config = get_model_config(config_name)
        vision = config["vision_cfg"]
        same = (vision["width"], vision.get("patch_size")) == (width, patch)
        if same and (vision["image_size"] // patch) ** 2 == patches:
            config["text_cfg"]["context_length"] = len(state[POSITIONS])
            return name, config | {"quick_gelu": True}
    raise ValueError(f"OpenAI has no CLIP with an image tower of width {width}, patch size {patch}")
