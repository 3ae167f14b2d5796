"""Load weights into a model, strictly."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_text_pos_embed

from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.models.libraries import quiet, translate_errors
from clip_retrieval.models.long_clip import stretch_positions
from clip_retrieval.models.model_config import ClipModule, State
from clip_retrieval.models.pooled import pool_type
from clip_retrieval.models.projection import text_part
from clip_retrieval.models.towers import make_adaptor
from clip_retrieval.models.weights import UNKNOWN_WEIGHTS, join_first


def load_into(
    clip: ClipModule,
    state: State,
    source: str,
    name: str,
    random: tuple[str, ...] = (),
    keep_positions: int | None = None,
) -> None:
    """Load `state` into a model, strictly; only `logit_bias` and names that start with `random` may be missing.

    Text position embeddings are resized to the model's context length, see `_resize_text_positions`. Raises UserError,
    naming `source`, `name` and the weights, if they do not fit.
    """
    own = clip.state_dict()
    with translate_errors(f"{source} {UNKNOWN_WEIGHTS}"):
        state = _fit(clip, state, own)
    for key in ("positional_embedding", "text.positional_embedding"):
        given, new = state.get(key), own.get(key)
        if given is not None and new is not None and given.ndim == 2 and given.shape[1:] == new.shape[1:]:
            state[key] = _resize_text_positions(clip, given, new, source, keep_positions)
    missing = [key for key in own if key not in state and not key.startswith(("logit_bias", *random))]
    unexpected = [key for key in state if key not in own]
    differing = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {problem} ({join_first(keys)})"
        for keys, problem in ((missing, "missing"), (unexpected, "unexpected"), (differing, "of another shape"))
        if keys
    ]
    if problems:
        raise UserError(
            f"{source} does not fit {name}: {', '.join(problems)}; give the model of these weights as --vision_model"
        )
    refuse_not_finite({key: state[key] for key in own if key in state}, source)
    clip.load_state_dict(state, strict=False)


def check_adaptor(adaptor: State, dim: int, source: str) -> None:
    """Raise UserError, naming `source`, for adaptor weights that are not finite or do not fit `dim` features."""
    own = make_adaptor(dim).state_dict()
    if adaptor and {name: v.shape for name, v in adaptor.items()} != {name: v.shape for name, v in own.items()}:
        raise UserError(f"{source} does not fit: its adaptor is not for features of {dim} dimensions")
    refuse_not_finite({f"adaptor.{name}": v for name, v in adaptor.items()}, source)


def refuse_not_finite(state: State, source: str) -> None:
    """Raise UserError, naming `source` and the weight, for NaN or infinity. Needs no memory."""
    for name, value in state.items():
        has_values = value.is_floating_point() and value.numel() and not value.is_meta
        if has_values and not all(bound.isfinite() for bound in torch.aminmax(value)):
            raise UserError(f"{source}: {name} is not finite (NaN or infinity); give other weights")


def _fit(clip: ClipModule, state: State, own: State) -> State:
    """Convert `state` to the names and sizes of this version of open_clip and this model."""
    state = convert_state_dict(clip, dict(state))
    if "positional_embedding" in state and "positional_embedding" not in own:
        state = convert_to_custom_text_state_dict(state)
    # buffers that older versions of open_clip and transformers saved
    for key in [key for key in state if key.endswith(("attn_mask", "position_ids")) and key not in own]:
        del state[key]
    for key in ("logit_scale", "logit_bias"):
        if key in state and key in own and state[key].numel() == own[key].numel():
            state[key] = state[key].reshape(own[key].shape)
    return state


def _resize_text_positions(
    clip: ClipModule, positions: torch.Tensor, own: torch.Tensor, source: str, keep: int | None
) -> torch.Tensor:
    """Resize positions to another context length, and log how.

    A shorter context keeps the first positions, so the features of captions that fit do not change. A longer one keeps
    the first `keep`, as Long-CLIP does. Without `keep`, or if a shorter tower pools its last position, all are
    interpolated as open_clip does. Raises UserError if `keep` is not below their number.
    """
    text, number, length = text_part(clip), len(positions), len(own)
    if length == number:
        return positions
    has_class_token = getattr(text, "cls_emb", None) is not None  # CoCa's, at the last position
    if length > number and keep:
        others = number - has_class_token
        if keep >= others:
            raise UserError(f"--keep_positions {keep}: must be less than the {others} positions of {source}")
        how = f"the first {keep} stay, the others are stretched by {(length - number) / (others - keep) + 1:.3g}"
        resized = stretch_positions(positions[:others], length - has_class_token, keep)
        resized = torch.cat([resized, positions[others:]])
    elif length < number and pool_type(text) in ("argmax", "eos") and not has_class_token:
        how, resized = f"the first {length} are kept", positions[:length]
    else:
        advice = "; --keep_positions 20 keeps the first ones, as Long-CLIP does" if length > number else ""
        how = f"all are interpolated{advice}"
        state = {"positional_embedding": positions}
        with quiet():
            resize_text_pos_embed(state, SimpleNamespace(positional_embedding=own))
        resized = state["positional_embedding"]
    log.info(f"{source} has {number} text positions, the model {length}: {how}")
    return resized
