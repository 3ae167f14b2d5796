"""Recognise files and folders that hold no model of their own, and say how to get one from them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clip_retrieval.models.wrappers import tensors_of

_ADAPTER = re.compile(r"(?:^|\.)(?:lora_|ia3_|hada_|lokr_|base_layer\.|modules_to_save\.)")
_ADAPTER_PROBLEM = "holds the weights of an adapter (LoRA, peft)"
_MERGE = "merge it: torch.save(PeftModel.from_pretrained(MODEL, ADAPTER).merge_and_unload().state_dict(), NEW)"
_SHARDS_PROBLEM = "is a part of a DeepSpeed checkpoint, without all weights"
_JOIN_SHARDS = "join its parts: python zero_to_fp32.py FOLDER NEW (the script is in the checkpoint's folder)"
_SHARD_FILE = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+|mp_rank_\d+_\d+_optim_states")

_STARTS = (
    (rb"version https://git-lfs", "a git-lfs pointer, not the weights", "run `git lfs pull` in its folder"),
    (
        rb"\s*<(?:!doctype|html)",
        "a web page, not the weights",
        "download the file itself (on huggingface.co, /resolve/ instead of /blob/)",
    ),
    (rb"\x93NUMPY", "an array of NumPy, not named weights", "give a .pt or .safetensors file"),
    (rb"\x89HDF", "weights of Keras (HDF5)", "give the PyTorch weights of the model, .pt or .safetensors"),
)
NUMPY_ARCHIVE = (
    "an archive of NumPy arrays (.npz), as big_vision saves",
    "convert it with open_clip: torch.save(open_clip.create_model(MODEL, pretrained=FILE).state_dict(), NEW)",
)
"""Problem and remedy."""

_FOLDERS = (
    ("adapter_config.json", _ADAPTER_PROBLEM, "give it as --pretrained"),
    ("zero_to_fp32.py", "is a DeepSpeed checkpoint", _JOIN_SHARDS),
    ("*mp_rank_*_states.pt", "is a DeepSpeed checkpoint", _JOIN_SHARDS),
    (
        "*.distcp",
        "is a distributed checkpoint of torch",
        "join its parts: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER NEW",
    ),
)


def find_start_problem(start: bytes) -> tuple[str, str] | None:
    """Return problem and remedy of a file of another kind, from its first bytes; None if its kind is not known."""
    kinds = ((problem, remedy) for pattern, problem, remedy in _STARTS if re.match(pattern, start, re.IGNORECASE))
    return next(kinds, None)


def find_folder_problem(folder: Path) -> str | None:
    """Return the problem of a folder of another kind, and the remedy; None if its kind is not known."""
    for pattern, problem, remedy in _FOLDERS:
        if next(folder.glob(pattern), None):
            return f"{problem}; {remedy}"
    return None


def find_names_problem(names: Iterable[str]) -> str | None:
    """Return the problem of a state dict with these names, and the remedy; None if it may be a model's."""
    return f"{_ADAPTER_PROBLEM}; {_MERGE}" if any(map(_ADAPTER.search, names)) else None


def find_shard_problem(path: Path, content: Any) -> str | None:
    """Return the problem of a part of a DeepSpeed checkpoint, and the remedy; None for other files.

    mp_rank_00_model_states.pt has all weights, except after training with ZeRO-3, which leaves empty tensors.
    """
    content = content if isinstance(content, dict) else {}
    is_shard = _SHARD_FILE.search(path.name) is not None
    if {"ds_config", "ds_version", "param_shapes"} & content.keys():
        module = content.get("module")
        weights = tensors_of(module).values() if isinstance(module, dict) else ()
        is_shard |= not weights or any(getattr(value, "shape", None) == (0,) for value in weights)
    return f"{_SHARDS_PROBLEM}; {_JOIN_SHARDS}" if is_shard else None
