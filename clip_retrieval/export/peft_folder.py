"""A folder that peft reads: the LoRA adapter of a run, for a base model of transformers."""

from __future__ import annotations

import importlib.util
import shutil
from contextlib import suppress
from pathlib import Path

import torch

from clip_retrieval.api import ImageTextModel
from clip_retrieval.errors import UserError
from clip_retrieval.export import transformers_folder
from clip_retrieval.export.sample import Exported, Sample
from clip_retrieval.files import read_json, write_json
from clip_retrieval.models.build import build_model
from clip_retrieval.models.checkpoint import Checkpoint, TrainingCheckpoint
from clip_retrieval.models.model_config import State
from clip_retrieval.models.model_folder import find_folder, holds_open_clip
from clip_retrieval.models.names import FOLDER, HUB, resolve
from clip_retrieval.models.peft_adapter import CONFIG, FILES, FIRST, PREFIX, SECOND
from clip_retrieval.models.transformers_weights import to_transformers
from clip_retrieval.options import ModelOptions

BASE = "base"
POOLING = "vision_model.head.attention"
"""SigLIP's attention pooling, an nn.MultiheadAttention. peft cannot adapt it: it is saved whole, merged."""
TIMM_POOLING = tuple(f"visual.trunk.attn_pool.{part}.weight" for part in ("q", "kv", "proj"))
"""Its weights here."""


def write(model: ImageTextModel, folder: Path, checkpoint: Checkpoint) -> None:
    """Write adapter_config.json, adapter_model.safetensors, and the base model of transformers to the folder `base`.

    Raises UserError if the checkpoint has no adapter.
    """
    from safetensors.torch import save_file

    # the adapter of the run
    lora = checkpoint.lora if isinstance(checkpoint, TrainingCheckpoint) else None
    if not lora:
        raise UserError(
            f"{checkpoint.path} holds no adapter (best.pt has only merged weights); give the last.pt of a run with "
            "--trainable lora"
        )
    if importlib.util.find_spec("peft") is None:
        raise UserError("--format peft needs peft, which checks the adapter: pip install peft")

    # the base model, and the adapter under its names
    base, first, second, scale = (_select(lora, name) for name in ("weight", "A", "B", "scale"))
    (folder / BASE).mkdir()
    transformers_folder.write(model, folder / BASE, base)
    kind, tensors = _convert(model, first, second)
    save_file(tensors, folder / FILES[0], metadata={"format": "pt"})

    # the config
    rank = next(iter(first.values())).shape[1]
    alpha = next(iter(scale.values())).item() * rank
    names = {name.removeprefix(PREFIX).removesuffix(FIRST) for name in tensors if name.endswith(FIRST)}
    config = {
        "peft_type": "LORA",
        "auto_mapping": {"base_model_class": f"{kind}Model", "parent_library": "transformers"},
        "base_model_name_or_path": _find_start(checkpoint.options["vision_model"], checkpoint.model | base),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": checkpoint.options.get("lora_dropout", 0.0),
        "target_modules": sorted(names),
        "modules_to_save": [POOLING] if any(POOLING in name for name in tensors) else None,
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / CONFIG, config)


def relocate(folder: Path, output: Path) -> None:
    """Prepare a folder for its move: drop a base model that the config names, else name it."""
    config = read_json(folder / CONFIG)
    if config["base_model_name_or_path"]:
        shutil.rmtree(folder / BASE)
    else:
        write_json(folder / CONFIG, config | {"base_model_name_or_path": str(output.absolute() / BASE)})


def read(folder: Path, sample: Sample) -> Exported:
    """Compute the features with peft."""
    from peft import PeftModel

    def adapt(model: torch.nn.Module) -> torch.nn.Module:
        PeftModel.from_pretrained(model, str(folder))  # changes the model's layers
        return model

    return transformers_folder.read(folder / BASE, sample, adapt)


def _select(lora: State, name: str) -> State:
    return {key.removesuffix(f".{name}"): value for key, value in lora.items() if key.endswith(f".{name}")}


def _convert(model: ImageTextModel, first: State, second: State) -> tuple[str, State]:
    """Return the model class of transformers, and A and B of each of its layers under peft's names.

    The three A of queries, keys and values are stacked like their fused weight, to be split as it is; so are the B.
    """
    state = model.model.clip.state_dict()
    kind, built = transformers_folder.build(model, state)
    merged = {name: value for name, value in built.state_dict().items() if value.is_floating_point()}
    marks = {name: torch.full_like(value, float(name in first)) for name, value in state.items()}
    adapted = [name for name, mark in to_transformers(marks, merged).items() if mark.all()]
    tensors: State = {}
    for part, values, axis in ((FIRST, first, 0), (SECOND, second, 1)):
        # A replaces the rows of a weight by its rank, and B the columns
        rank = next(iter(values.values())).shape[1 + axis]
        stacked = {name: value.flatten(0, 1) for name, value in values.items() if name not in TIMM_POOLING}
        own = [name for name in adapted if not name.startswith(POOLING)]
        shaped = {name: merged[name].narrow(axis, 0, 1).repeat_interleave(rank, axis) for name in own}
        found = to_transformers(state | stacked, merged | shaped)
        tensors |= {f"{PREFIX}{name.removesuffix('.weight')}{part}": found[name].contiguous() for name in own}
    if any(name.startswith(POOLING) for name in adapted):
        pooling = {name: value for name, value in merged.items() if name.startswith(POOLING)}
        tensors |= {f"{PREFIX}{name}": value for name, value in pooling.items()}
    return kind, tensors


def _find_start(name: str, weights: State) -> str | None:
    """Return the folder or hub id of a model's name if it is transformers' and has these weights.

    Otherwise the run started from something else: other weights, another size, or a merged adapter.
    """
    if not name.startswith((HUB, FOLDER)):
        return None
    with suppress(UserError):
        start = build_model(ModelOptions(vision_model=name)).clip.state_dict()
        start |= {key: weights[key] for key in ("logit_scale", "logit_bias") if key in weights}  # trained, too
        is_same = start.keys() == weights.keys() and all(torch.equal(v, weights[key]) for key, v in start.items())
        if is_same and not holds_open_clip(find_folder(resolve(name))):
            place = name.partition(":")[2]
            return place if name.startswith(HUB) else str(Path(place).absolute())
    return None
