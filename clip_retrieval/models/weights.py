"""Weight files of every format, read into one form.

Nothing here unpickles Python objects: a file that asks for them is refused.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clip_retrieval.errors import UserError
from clip_retrieval.models import chinese_clip, hub, simple_clip

OURS = "ours"
OPENAI_ARCHIVE = "openai archive"
OPENAI_CODE = "openai code"
CLIP_TRAINING = "clip-training"
CHINESE_CLIP = "chinese-clip"
SIMPLE_CLIP = "simple-clip"
STATE_DICT = "state dict"

WEIGHT_FILES = (".pt", ".pth", ".bin", ".safetensors")
"""How the names of weight files end."""

_ARCHIVE_FACTS = ("input_resolution", "context_length", "vocab_size")
_READ_ERRORS = (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError)


@dataclass
class Weights:
    """What a weight file holds.

    Attributes:
        source: the file.
        kind: OURS: a checkpoint of ours; OPENAI_ARCHIVE: OpenAI's TorchScript file; OPENAI_CODE: saved by a system
            that runs OpenAI's own model (Clip_crossmodal_retrieval's adaptor); CLIP_TRAINING; CHINESE_CLIP;
            SIMPLE_CLIP; STATE_DICT: any other.
        state: float32 CPU tensors under open_clip's names, an adaptor's as `adaptor.*`.
        model_config, preprocess, options: of a checkpoint of ours, else None.
    """

    source: str
    kind: str
    state: dict[str, torch.Tensor]
    model_config: dict[str, Any] | None = None
    preprocess: dict[str, Any] | None = None
    options: dict[str, Any] | None = None


def read_weights(path: str | Path) -> Weights:
    """Read a weight file.

    OpenAI's archives, open_clip's .pt and .safetensors, Chinese-CLIP's, CLIP_ITM's, clip-training's, simple-clip's and
    Clip_crossmodal_retrieval's .pt, and checkpoints of ours. Raises UserError where the file is missing, damaged, no
    checkpoint, or holds Python objects.
    """
    path = Path(path)
    _check_is_file(path)
    if _is_safetensors(path):
        return _from_content(path, _read_safetensors(path))
    if _is_torchscript(path):
        state = {name: v for name, v in _read_torchscript(path).items() if name not in _ARCHIVE_FACTS}
        return Weights(str(path), OPENAI_ARCHIVE, _float32(state))
    return _from_content(path, _read_tensors(path))


def read_text_tower(
    place: str,
    rename: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    kind: str,
    hf_config: dict[str, Any],
) -> dict[str, torch.Tensor]:
    """A text tower's weights from a folder, a file or the hub, float32.

    Args:
        place: where they are.
        rename: gives them the names of our text tower, and nothing where they are of another kind.
        kind: "BERT" or "DistilBERT", for messages.
        hf_config: our text tower's own config.

    Raises UserError as `read_weights` does, and where the file holds none of this kind, or the config.json beside it
    one that computes something else.
    """
    path = Path(place)
    if path.is_dir():
        files = [path / name for name in hub.BERT_FILES if (path / name).exists()]
        if not files:
            raise UserError(f"{path} holds no {' or '.join(hub.BERT_FILES)}; give the folder of a {kind}")
        _check_same_tower(path / "config.json", hf_config)
        path = files[0]
    elif not path.exists() and path.suffix not in WEIGHT_FILES:
        path = Path(hub.fetch_bert(place))
    _check_is_file(path)
    content = _read_safetensors(path) if _is_safetensors(path) else _read_tensors(path)
    tensors = content.items() if isinstance(content, dict) else ()
    state = {name: v for name, v in tensors if isinstance(name, str) and isinstance(v, torch.Tensor)}
    state = rename(_float32(_without_prefix(state, "module.")))
    if not state:
        raise UserError(f"{path} holds no {kind}; give another --text_pretrained")
    return state


def _check_same_tower(config: Path, hf_config: dict[str, Any]) -> None:
    """Raise UserError where a config.json differs in what the shapes of the weights do not tell."""
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    ours = {"activation": "gelu", "sinusoidal_pos_embds": False, "hidden_act": "gelu"} | hf_config
    for key in ("n_heads", "num_attention_heads", "activation", "hidden_act", "sinusoidal_pos_embds"):
        if isinstance(found, dict) and key in found and key in ours and found[key] != ours[key]:
            raise UserError(
                f"{config}: {key} is {found[key]}, the text tower's {ours[key]}; give other weights, or a model config "
                "with it"
            )


def export_chinese_clip(checkpoint: Path, output: Path) -> None:
    """Write a checkpoint of ours that holds a Chinese-CLIP as that system's own code reads it.

    Raises UserError where `checkpoint` holds something else, or `output` is there already.
    """
    content = read_checkpoint(checkpoint)
    if content is None or not chinese_clip.is_chinese_clip(content["model_config"]):
        raise UserError(f"{checkpoint} is no checkpoint of ours with a Chinese-CLIP model; give one")
    if output.exists():
        raise UserError(f"{output} is there already; choose another name, or take it away")
    state = chinese_clip.to_reference(content["model"])
    temporary = output.with_name(f".{output.name}.tmp")
    torch.save({"epoch": content["epoch"], "step": content["step"], "name": "", "state_dict": state}, temporary)
    temporary.replace(output)


def read_checkpoint(path: str | Path) -> dict[str, Any] | None:
    """All of a checkpoint of ours, the state of its run included; None where the file holds something else.

    Raises UserError as `read_weights` does.
    """
    path = Path(path)
    _check_is_file(path)
    if _is_safetensors(path) or _is_torchscript(path):
        return None
    content = _read_tensors(path)
    if not _is_ours(content):
        return None
    _check_ours(path, content)
    return content


def _is_ours(content: Any) -> bool:
    return isinstance(content, dict) and "model" in content and "model_config" in content


def _check_ours(path: Path, content: dict[str, Any]) -> None:
    """Raise UserError where a checkpoint of ours lacks something that every one has."""
    kinds = {"model": dict, "model_config": dict, "preprocess": dict, "options": dict, "epoch": int, "step": int}
    if "optimizer" in content:
        kinds |= dict.fromkeys(("learning", "scaler", "random", "sampler", "progress"), dict)
    lacking = ", ".join(name for name, kind in kinds.items() if not isinstance(content.get(name), kind))
    if lacking:
        raise UserError(f"{path} is a damaged checkpoint: it lacks {lacking}; take another one")


def _read_tensors(path: Path) -> Any:
    """What a file of `torch.save` holds: tensors, numbers, strings, and dicts and lists of them.

    Tensors stay on the disk until they are used, where the format allows it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path) or _first_bytes(path, 1) == b"\x80":
            raise UserError(
                f"{path} holds Python objects beside weights and is refused, as loading them can run any code; if you "
                "trust it, save its weights alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)"
            ) from error
        raise _unreadable(path, "no checkpoint") from error
    except _READ_ERRORS as error:
        raise _unreadable(path, "damaged, cut short or no checkpoint") from error


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the weight file in it")
    if not path.exists():
        raise UserError(f"{path}: no such weight file")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; fetch it again")


def _unreadable(path: Path, what: str) -> UserError:
    return UserError(f"{path} cannot be read as weights: {what}; fetch it again")


def _first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _is_safetensors(path: Path) -> bool:
    # Eight bytes of length, then a JSON header.
    return path.suffix == ".safetensors" or _first_bytes(path, 9)[8:] == b"{"


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, *_READ_ERRORS) as error:
        raise _unreadable(path, "damaged, cut short or not in the safetensors format") from error


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            inner = [name.partition("/")[2] for name in archive.namelist()]
    except zipfile.BadZipFile:
        return False
    return "constants.pkl" in inner and any(name.startswith("code/") for name in inner)


def _read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            code = [archive.read(entry) for entry in archive.infolist() if "/code/" in entry.filename]
        # The one thing that runs while an archive is loaded, and it may write files. OpenAI's have none.
        if any(b"__setstate__" in text for text in code):
            raise UserError(f"{path} runs code of its own when it is loaded and is refused; save its state dict alone")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.load(str(path), map_location="cpu").state_dict()
    except (zipfile.BadZipFile, zlib.error, *_READ_ERRORS) as error:
        raise _unreadable(path, "a damaged TorchScript archive") from error


def _from_content(path: Path, content: Any) -> Weights:
    if _is_ours(content):
        _check_ours(path, content)
        return Weights(
            str(path),
            OURS,
            _float32(content["model"]),
            content["model_config"],
            content.get("preprocess"),
            content.get("options") or {},
        )
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a model's weights")
    holder = next((k for k in ("state_dict", "model_state_dict", "model") if isinstance(content.get(k), dict)), None)
    state = content if holder is None else content[holder]
    state = {name: v for name, v in state.items() if isinstance(name, str) and isinstance(v, torch.Tensor)}
    if not state:
        raise UserError(f"{path} holds no weights (it has {some([str(key) for key in content])})")
    state = _float32(_without_prefix(_without_prefix(state, "_orig_mod."), "module."))
    if any(name.startswith("bert.") for name in state):
        return Weights(str(path), CHINESE_CLIP, chinese_clip.to_open_clip(state))
    if any(name.startswith("clip_model.") for name in state):
        return Weights(str(path), OPENAI_CODE, _with_adaptor(state))
    if simple_clip.is_reference(state):
        return Weights(str(path), SIMPLE_CLIP, simple_clip.from_reference(state))
    # What clip-training writes beside the weights: others call them model_state_dict as well.
    is_clip_training = holder == "model_state_dict" and "global_step" in content
    return Weights(str(path), CLIP_TRAINING if is_clip_training else STATE_DICT, state)


def _without_prefix(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """`state` without what DistributedDataParallel or torch.compile put before every name."""
    if not all(name.startswith(prefix) for name in state):
        return state
    return {name.removeprefix(prefix): v for name, v in state.items()}


def _with_adaptor(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Clip_crossmodal_retrieval's CLIP with an adaptor, and a logit scale of their own that was trained."""
    clip = {name.removeprefix("clip_model."): v for name, v in state.items() if name.startswith("clip_model.")}
    layers = "additional_layers.fc."
    adaptor = {f"adaptor.{name.removeprefix(layers)}": v for name, v in state.items() if name.startswith(layers)}
    rest = {name: v for name, v in state.items() if not name.startswith(("clip_model.", layers))}
    return {**clip, **adaptor, **rest}


def _float32(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: v.float() if v.is_floating_point() else v for name, v in state.items()}


def some(names: Iterable[str]) -> str:
    """The first few of `names`, for a message."""
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
