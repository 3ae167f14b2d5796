"""A folder in the layout of open_clip on the Hugging Face hub."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2

from clip_retrieval.api import ImageTextModel
from clip_retrieval.data.pixels.transforms import RESIZE_SIZE
from clip_retrieval.errors import UserError
from clip_retrieval.export.sample import Exported, Sample
from clip_retrieval.export.tokenizer_files import to_transformers
from clip_retrieval.files import read_json, write_json
from clip_retrieval.models.families import find_family
from clip_retrieval.models.hugging_face import load_tokenizer
from clip_retrieval.models.image_size import ImageSize, format_size, height_and_width
from clip_retrieval.models.instantiate import read_hf_config
from clip_retrieval.models.libraries import quiet

CONFIG, WEIGHTS, TEXT_TOWER = "open_clip_config.json", "open_clip_model.safetensors", "text_tower"
PREPROCESS = ("mean", "std", "interpolation", "resize_mode", "fill_color")

HUB_NAMES = {
    "RoBERTa-wwm-ext-base-chinese": "hfl/chinese-roberta-wwm-ext",
    "RoBERTa-wwm-ext-large-chinese": "hfl/chinese-roberta-wwm-ext-large",
    "RBT3-chinese": "hfl/rbt3",
}
"""Hub names of Chinese-CLIP's text towers."""


def write(model: ImageTextModel, folder: Path) -> None:
    """Write config, weights and, unless the tokenizer is CLIP's own, its files."""
    from safetensors.torch import save_file

    if find_family(model.config).module:
        raise UserError(f"{model.name}: open_clip has no such architecture; use --format onnx")
    if model.model.preprocess.get(RESIZE_SIZE):
        raise UserError(
            f"{model.name}: open_clip cannot resize to one size and crop to another; use --format transformers"
        )
    config = deepcopy(model.config)
    text = config["text_cfg"]
    for name in ("vocab", "tokenizer_files"):
        text.pop(name, None)
    vision = config["vision_cfg"]
    if "timm_model_name" in vision:
        vision["timm_model_name"] = _name_timm_tower(vision["timm_model_name"], model.model.preprocess["size"])
    if hf_config := text.pop("hf_config", None):
        text["hf_model_name"] = _name_text_tower(text["hf_model_name"], hf_config, folder / TEXT_TOWER)
    if not isinstance(model.tokenizer, SimpleTokenizer):
        to_transformers(model.tokenizer).save_pretrained(folder)
    preprocess = {name: model.model.preprocess[name] for name in PREPROCESS}
    write_json(folder / CONFIG, {"model_cfg": config, "preprocess_cfg": preprocess})
    # copies: tensors that share memory are refused
    state = {name: value.detach().clone().contiguous() for name, value in model.model.clip.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def _name_timm_tower(name: str, size: ImageSize) -> str:
    """Return timm's name of the tower at this size if there is one: open_clip builds a tower only at timm's size."""
    import timm

    height, width = height_and_width(size)
    resized = re.sub(r"\d+$", str(height), name)
    return resized if height == width and timm.is_model(resized) else name


def _name_text_tower(name: str, hf_config: dict[str, Any], folder: Path) -> str:
    """Return the name under which open_clip finds the config of a text tower.

    It is the hub's name if the hub has the same config. Any other config is written to `folder`: open_clip reads one
    only from the hub or from a path.
    """
    name = HUB_NAMES.get(name, name)
    try:
        found = read_hf_config(name, name)
        if all(found.get(key) == value for key, value in hf_config.items() if key in found):
            return name
    except UserError:
        pass
    folder.mkdir()
    write_json(folder / "config.json", hf_config)
    return str(folder.absolute())


def relocate(folder: Path, output: Path) -> None:
    """Prepare a folder for its move: the config of a text tower is found by its absolute path."""
    content = read_json(folder / CONFIG)
    if (folder / TEXT_TOWER).is_dir():
        content["model_cfg"]["text_cfg"]["hf_model_name"] = str(output.absolute() / TEXT_TOWER)
        write_json(folder / CONFIG, content)


def read(folder: Path, sample: Sample) -> Exported:
    """Compute the features with open_clip."""
    import open_clip

    with quiet(), torch.inference_mode():
        try:
            model: Any = open_clip.create_model(f"local-dir:{folder}").eval()
        except RuntimeError as error:
            if "size mismatch for visual.trunk" not in str(error):
                raise
            tower = read_json(folder / CONFIG)["model_cfg"]["vision_cfg"]["timm_model_name"]
            raise UserError(
                f"open_clip builds {tower} only for timm's image size, not for --image_size "
                f"{format_size(sample.pixels.shape[2:])}; choose another --format, or see docs/export.md"
            ) from None
        transform = image_transform_v2(PreprocessCfg(**open_clip.get_model_preprocess_cfg(model)), is_train=False)
        pixels = torch.stack([transform(image) for image in sample.images])
        features = model.encode_image(sample.pixels), model.encode_text(sample.tokens.ids)
    text = read_json(folder / CONFIG)["model_cfg"]["text_cfg"]
    length, arguments = sample.tokens.ids.shape[1], text.get("tokenizer_kwargs") or {}
    if text.get("hf_tokenizer_name"):
        arguments = arguments | {"context_length": length, "tokenizer_mode": text.get("tokenizer_mode")}
        tokenizer = load_tokenizer(HFTokenizer, str(folder), "", **arguments)
    else:
        tokenizer = SimpleTokenizer(context_length=length, **arguments)
    return Exported(*features, pixels=pixels, ids=tokenizer(sample.texts))
