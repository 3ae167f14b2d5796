"""Read weight files of every format into one form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.models import hub
from clip_retrieval.models.checkpoint import Checkpoint
from clip_retrieval.models.families import FAMILIES, OPEN_CLIP, OPENAI_ARCHIVE, OURS, Family, recognise
from clip_retrieval.models.foreign import find_names_problem, find_shard_problem
from clip_retrieval.models.hugging_face import read_model_json
from clip_retrieval.models.libraries import translate_errors
from clip_retrieval.models.model_config import State
from clip_retrieval.models.model_folder import INDEX, read_shard_names
from clip_retrieval.models.pickled import Unusable
from clip_retrieval.models.tensor_files import read_tensor_file
from clip_retrieval.models.wrappers import FoundState, find_states

BERT_FILES = ("model.safetensors", "pytorch_model.bin")
WEIGHT_FILES = (".pt", ".pth", ".bin", ".safetensors")
"""Suffixes of weight files."""

UNKNOWN_WEIGHTS = "does not hold the weights of a known model"
"""Problem of a file if its tensors have unexpected shapes."""


@dataclass
class Weights:
    """The content of a weight file.

    Attributes:
        source: the file.
        family: the system that saved it.
        state: float32 CPU tensors under open_clip's names; an adaptor's as `adaptor.*`.
        checkpoint: the whole content of a checkpoint of ours, else None.
    """

    source: str
    family: Family
    state: State
    checkpoint: Checkpoint | None = None


def read_weights(
    path: str | Path, key: str | None = None, change: Callable[[State], State] = lambda state: state
) -> Weights:
    """Read a weight file.

    Supports OpenAI's archives, open_clip's .pt and .safetensors, the .pt of Chinese-CLIP, CLIP_ITM, clip-training,
    simple-clip and Clip_crossmodal_retrieval, transformers' files and the index of their shards, and
    checkpoints of ours. Any of them may be wrapped; see `wrappers`.

    Args:
        path: the file.
        key: the weights to take from a file with several (--pretrained_key); averaged ones by default.
        change: applied to the weights under their own names.

    Raises:
        UserError: the file is missing, damaged, not a checkpoint, holds Python objects, or has no such key.
    """
    path = Path(path)
    if path.name.endswith(INDEX):
        state: State = {}
        for shard in read_shard_names(path):
            content = read_tensor_file(shard).content
            if not isinstance(content, dict):
                raise UserError(f"{shard} holds a {type(content).__name__}, not a model's weights")
            state |= content
        return _from_content(path, state, key, change)
    file = read_tensor_file(path)
    if not file.is_torchscript:
        return _from_content(path, file.content, key, change)
    state = _choose(path, file.content, find_states(file.content, _is_clip), key)
    return Weights(str(path), OPENAI_ARCHIVE, change(_float32(path, state)))


def read_text_tower(place: str, rename: Callable[[State], State], kind: str, hf_config: dict[str, Any]) -> State:
    """Read a text tower's weights from a folder, a file or the hub, as float32.

    Args:
        place: a folder, a file or a hub name.
        rename: renames a state dict to our text tower's names; empty for another kind of model.
        kind: "BERT" or "DistilBERT", for messages.
        hf_config: our text tower's own config.

    Raises UserError as `read_weights` does, and if the file holds another kind of model, or the config.json beside it
    contradicts `hf_config`.
    """
    path = Path(place)
    if path.is_dir():
        files = [path / name for name in BERT_FILES if (path / name).exists()]
        if not files:
            raise UserError(f"{path} holds no {' or '.join(BERT_FILES)}; give the folder of a {kind}")
        _check_same_tower(path / "config.json", hf_config)
        path = files[0]
    elif not path.exists() and path.suffix not in WEIGHT_FILES:
        failure = (
            f"--text_pretrained {place}: no such file or folder, and its weights could not be fetched from "
            f"huggingface.co; give the folder of a downloaded {kind}"
        )
        path = Path(hub.fetch_files(place, BERT_FILES, failure))
    content = read_tensor_file(path).content
    content = content if isinstance(content, dict) else {}
    found = find_states(content, lambda state: bool(rename(state)))
    with translate_errors(f"{path} {UNKNOWN_WEIGHTS}"):
        state = rename(_choose(path, content, found))
    if not state:
        raise UserError(f"{path} holds no {kind}; give another --text_pretrained")
    return _float32(path, state)


def _check_same_tower(config: Path, hf_config: dict[str, Any]) -> None:
    """Raise UserError if a config.json differs in a field that the shapes of the weights do not show."""
    found = read_model_json(config, "config of a text tower") if config.exists() else {}
    ours = {"activation": "gelu", "sinusoidal_pos_embds": False, "hidden_act": "gelu"} | hf_config
    for key in ("n_heads", "num_attention_heads", "activation", "hidden_act", "sinusoidal_pos_embds"):
        if isinstance(found, dict) and key in found and key in ours and found[key] != ours[key]:
            raise UserError(
                f"{config}: {key} is {found[key]}, but the text tower's {ours[key]}; give other weights, or a model "
                "config with the same value"
            )


def _from_content(path: Path, content: Any, key: str | None, change: Callable[[State], State]) -> Weights:
    if ours := Checkpoint.from_content(path, content):
        if key is not None:
            raise UserError(f"--pretrained_key {key}: {path} is a checkpoint of ours with one model; drop the option")
        return Weights(str(path), OURS, change(_float32(path, ours.model)), ours)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a model's weights")
    # whole models, else single towers
    found = find_states(content, _is_clip) or find_states(content, _is_image_tower)
    state = change(_float32(path, _choose(path, content, found, key)))
    with translate_errors(f"{path} {UNKNOWN_WEIGHTS}"):
        family = recognise(state, content)
        return Weights(str(path), family, family.to_open_clip(state))


def _is_clip(state: State) -> bool:
    return any(name.startswith("visual.") for name in state) or recognise(state, ()) is not OPEN_CLIP


def _is_image_tower(state: State) -> bool:
    return any(family.towers.vision_weights(state) for family in FAMILIES)


def _choose(path: Path, content: dict[Any, Any], found: list[FoundState], key: str | None = None) -> State:
    """Choose the weights with a key, by default averaged ones; log what is left out.

    Without any known model, return the largest state dict. Raises UserError if there is none, or not one with this key,
    or its tensors cannot be used.
    """
    if problem := find_shard_problem(path, content):
        raise UserError(f"{path} {problem}")
    found = found or sorted(find_states(content, lambda state: bool(state)), key=lambda each: -len(each.state))[:1]
    if not found:
        raise UserError(f"{path} holds no weights (it has {join_first([str(key) for key in content])})")
    keys = ", ".join(each.key for each in found)
    matching = [each for each in found if key is None or each.has_key(key)]
    chosen = next((each for each in matching if each.key == key), matching[0] if matching else None)
    if chosen is None:
        raise UserError(f"--pretrained_key {key}: {path} holds no such weights; choose from {keys}")

    # problems of these weights
    if problem := find_names_problem(chosen.state):
        raise UserError(f"{path} {problem}")
    for name, value in chosen.state.items():
        if isinstance(value, Unusable):
            raise UserError(f"{path}: {value.problem(name)}")

    # the log says what is not used
    if len(found) > 1:
        average = " (averaged)" if chosen.is_averaged else ""
        others = ", ".join(each.key for each in found if each is not chosen)
        log.warning(
            f"{path} holds several sets of weights; these are taken: {chosen.key}{average}. "
            f"--pretrained_key takes another one: {others}"
        )
    if chosen.beside:
        log.warning(f"{path}: tensors beside the model are not used: {join_first(chosen.beside)}")
    return chosen.state


def _float32(path: Path, state: State) -> State:
    """Convert a state dict to float32; a tensor under several names stays one tensor."""
    converted: dict[int, torch.Tensor] = {}
    for name, value in state.items():
        if value.is_complex():
            raise UserError(f"{path}: {name} has complex numbers, which no model supports; give another file")
        if id(value) not in converted:
            converted[id(value)] = value.float() if value.is_floating_point() else value
    return {name: converted[id(value)] for name, value in state.items()}


def join_first(names: Iterable[str]) -> str:
    """Join the first few names, for a message."""
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
