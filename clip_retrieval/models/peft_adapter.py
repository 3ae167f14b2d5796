"""LoRA adapters in peft's layout, merged into the weights of their base model as these are read."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clip_retrieval.errors import UserError
from clip_retrieval.models import hub
from clip_retrieval.models.hugging_face import read_model_json
from clip_retrieval.models.model_config import State
from clip_retrieval.models.model_folder import OPEN_CLIP_CONFIG, WEIGHTS
from clip_retrieval.models.names import FOLDER, HUB
from clip_retrieval.models.schema import SchemaError, either, entries, nothing, number, one_of, record, text
from clip_retrieval.models.tensor_files import read_tensor_file

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
_MODEL_FILES = (OPEN_CLIP_CONFIG, *WEIGHTS)
"""Files of a folder with a whole model."""

PREFIX = "base_model.model."
FIRST, SECOND = ".lora_A.weight", ".lora_B.weight"
_MULTIHEAD = ".base_layer.out_proj."
"""In the names of an adapted nn.MultiheadAttention, of which peft adds B A twice (huggingface/peft#3774)."""

_CONFIG = record(
    required={"peft_type": one_of("LORA"), "lora_alpha": number()},
    optional={
        "base_model_name_or_path": either(nothing, text),
        "use_rslora": one_of(True, False),
        "alpha_pattern": either(nothing, entries(number())),
        "bias": one_of("none"),
        "init_lora_weights": one_of(True, False, "gaussian", "eva", "orthogonal"),  # others change the base model
        "revision": either(nothing, one_of("main")),
    },
)
_WITHOUT_EFFECT: tuple[str, ...] = ("auto_mapping", "task_type", "inference_mode", "peft_version", "r", "rank_pattern")
_WITHOUT_EFFECT += ("lora_dropout", "target_modules", "exclude_modules", "layers_pattern", "layers_to_transform")
_WITHOUT_EFFECT += ("modules_to_save", "megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying")
_WITHOUT_EFFECT += ("fan_in_fan_out",)  # peft ignores it for nn.Linear, which all layers are
"""Fields that the tensors show, or that do not change a merged weight; other fields are refused unless empty."""

_LITERAL = re.compile(r"\^?[\w.]+")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        folder: its folder.
        config: the content of adapter_config.json, checked.
        alphas: place and alpha of each pattern of layer names that have their own.
        tensors: A and B of each layer, and whole weights of `modules_to_save`, by peft's names.
    """

    folder: Path
    config: dict[str, Any]
    alphas: dict[str, tuple[int, float]]
    tensors: State

    def find_base(self) -> str:
        """Return the `local-dir:` or `hf-hub:` name of the base model.

        It is a folder, also one of this name in the adapter's folder, or a hub id. Raises UserError if it is missing.
        """
        name = self.config.get("base_model_name_or_path") or ""
        for path in (Path(name), self.folder / Path(name).name):
            if name and os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises OSError for a name that is too long
                return f"{FOLDER}{path}"
        if _HUB_ID.fullmatch(name):
            return f"{HUB}{name}"
        raise UserError(
            f"{self.folder / CONFIG}: its base model ({name or 'not named'}) is missing; give it as --vision_model "
            "local-dir:BASE"
        )

    def merge(self, state: State) -> State:
        """Return the state dict of the base model, under transformers' names, with the adapter merged into it.

        Raises UserError if a tensor of the adapter does not fit it.
        """
        merged = dict(state)
        for key, value in self.tensors.items():
            name = key.removeprefix(PREFIX)
            if name in state:  # of modules_to_save
                fits = value.shape == state[name].shape
                merged[name] = value
            elif name.endswith(SECOND):
                fits = key.replace(SECOND, FIRST) in self.tensors
            else:
                name = f"{name.removesuffix(FIRST)}.weight"
                second = self.tensors.get(key.replace(FIRST, SECOND))
                fits = key.endswith(FIRST) and name in state and _fit(state[name], value, second)
                if fits and second is not None:
                    product = (second.float().flatten(1) @ value.float().flatten(1)).view(state[name].shape)
                    merged[name] = state[name] + self._scale(name, len(value)) * product
            if not fits or not value.is_floating_point():
                raise UserError(f"{self.folder}: {key} does not fit the base model; give the adapter's own base model")
        return merged

    def _scale(self, weight: str, rank: int) -> float:
        """Return the factor on B A of a weight. The first matching pattern gives its alpha."""
        module = weight.removesuffix(".weight")
        words = module.split(".")
        suffixes = {f"^{module}", *(".".join(words[start:]) for start in range(len(words)))}
        alpha = min((self.alphas[s] for s in suffixes if s in self.alphas), default=(0, self.config["lora_alpha"]))[1]
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _fit(weight: Tensor, first: Tensor, second: Tensor | None) -> bool:
    """Whether A (rank, columns) and B (rows, rank) of a layer, or those of a convolution, fit its weight."""
    if second is None or not second.is_floating_point() or first.ndim < 2 or second.ndim < 2 or not first.numel():
        return False
    return second.flatten(1).shape == (len(weight), len(first)) and first.shape[1:] == weight.shape[1:]


def read_adapter(place: str) -> Adapter | None:
    """Read the adapter in a folder, in a hub repository, or of a weight file; None if there is none.

    A folder with the weights of a whole model is none. Raises UserError, naming the file, if it is damaged, or of a
    kind that is not supported.
    """
    folder = _find_adapter(place)
    if folder is None:
        return None
    path = folder / CONFIG
    config = read_model_json(path, "config of an adapter")
    try:
        _CONFIG(config, "")
    except SchemaError as error:
        raise UserError(f"{path}: {error}; merge the adapter with peft first") from None
    checked = {"peft_type", "lora_alpha", "base_model_name_or_path", "use_rslora", "alpha_pattern", "bias", "revision"}
    checked |= {"init_lora_weights", *_WITHOUT_EFFECT}
    if unsupported := [name for name, value in config.items() if value and name not in checked]:
        raise UserError(f"{path}: {unsupported[0]} is not supported; merge the adapter with peft first")
    alphas = {name: (place, alpha) for place, (name, alpha) in enumerate((config.get("alpha_pattern") or {}).items())}
    for name in alphas:
        if not _LITERAL.fullmatch(name):
            raise UserError(f"{path}: alpha_pattern has a pattern that is no name; merge the adapter with peft first")
    file = next((folder / name for name in FILES if (folder / name).exists()), folder / FILES[0])
    content = read_tensor_file(file).content
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors or len(tensors) != len(content):
        raise UserError(f"{file} does not hold the tensors of an adapter; fetch it again")
    if any(_MULTIHEAD in name for name in tensors):
        raise UserError(f"{file} adapts an nn.MultiheadAttention, which is not supported; merge the adapter with peft")
    return Adapter(folder, config, alphas, tensors)


def _find_adapter(place: str) -> Path | None:
    if place.startswith(HUB):
        repository = place.removeprefix(HUB)
        config = hub.fetch_if_exists(repository, CONFIG)
        if config is None or any(hub.fetch_if_exists(repository, name) for name in _MODEL_FILES):
            return None
        hub.fetch_files(
            repository, FILES, f"the weights of the adapter {place} could not be fetched; check the network"
        )
        return Path(config).parent
    folder = Path(place.removeprefix(FOLDER))
    folder = folder.parent if folder.name in FILES else folder
    is_model = any((folder / name).exists() for name in _MODEL_FILES)
    return folder if (folder / CONFIG).exists() and not is_model else None
