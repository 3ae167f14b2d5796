"""Build a module from a model config: without running code, silent downloads, or running out of memory."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path

import timm
import torch
from open_clip.coca_model import CoCa
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP

from clip_retrieval.errors import UserError
from clip_retrieval.models import hub
from clip_retrieval.models.families import find_family
from clip_retrieval.models.hugging_face import filter_config, read_model_json
from clip_retrieval.models.image_size import height_and_width
from clip_retrieval.models.libraries import translate_errors
from clip_retrieval.models.memory import build_within_memory
from clip_retrieval.models.model_config import ClipModule, Config
from clip_retrieval.models.towers import RetrievalModel

DEFAULT_CONTEXT_LENGTH = 77
INVALID, REMEDY = "has a model config that cannot be built", "give another one"


def instantiate(config: Config, name: str) -> ClipModule:
    """Build the module of `config` with random weights; adds a fetched text tower's own config to `config`."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    if text.get("hf_config"):
        text["hf_config"] = filter_config(text["hf_config"], name)

    # keep timm from fetching or reading files
    if vision.get("timm_model_name"):
        tower = vision["timm_model_name"]
        if ":" in tower or not timm.is_model(tower):  # names with a prefix are fetched, or read from folders
            raise UserError(f"{name}: timm_model_name is {tower}, which is not a timm model")
        vision["timm_model_pretrained"] = False

    # a family's own class
    arguments = deepcopy(config)
    arguments["text_cfg"].pop("tokenizer_files", None)
    if isinstance(vision.get("layers"), (list, tuple)):
        # open_clip builds ResNets for squares only; `image_size.resize_image_tower` takes any size
        arguments["vision_cfg"]["image_size"] = max(height_and_width(vision.get("image_size", 224)))
    if module := find_family(config).module:
        with translate_errors(f"{name} {INVALID}", REMEDY):
            return build_within_memory(lambda: module(**deepcopy(arguments)), name)

    # open_clip's class, with the text tower's config in a folder if there is one
    arguments["text_cfg"].pop("vocab", None)
    hf_config = arguments["text_cfg"].pop("hf_config", None)
    custom_text = arguments.pop("custom_text", False) or bool(text.get("hf_model_name"))
    model_class = CoCa if "multimodal_cfg" in config else CustomTextCLIP if custom_text else CLIP
    with ExitStack() as stack:
        if text.get("hf_model_name"):
            text["hf_model_pretrained"] = arguments["text_cfg"]["hf_model_pretrained"] = False
            # open_clip reads a Hugging Face config only from a name or a folder.
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            content = json.dumps(hf_config or read_hf_config(text["hf_model_name"], name))
            (Path(folder) / "config.json").write_text(content)
            arguments["text_cfg"]["hf_model_name"] = folder
        stack.enter_context(translate_errors(f"{name} {INVALID}", REMEDY))
        clip: ClipModule = build_within_memory(lambda: model_class(**deepcopy(arguments)), name)

    # complete the weights and the config
    if isinstance(clip, CoCa):
        # open_clip leaves it uninitialised: arbitrary values, perhaps NaN.
        projection = clip.text_decoder.text_projection
        torch.nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
    if isinstance(getattr(clip, "text", None), HFTextEncoder) and not hf_config:
        text["hf_config"] = filter_config(json.loads(clip.text.config.to_json_string()), name)
    return clip


def read_hf_config(tower: str, name: str) -> Config:
    """Read the config.json of a text tower from a folder or the hub."""
    path = f"{tower}/config.json"
    if not Path(tower).is_dir():
        failure = f"{name}: its text tower {tower} could not be fetched from huggingface.co; check the network"
        path = hub.fetch_files(tower, ["config.json"], failure)
    return filter_config(read_model_json(Path(path), "config of a text tower"), path)


def try_model(clip: ClipModule, config: Config, preprocess: Config) -> None:
    """Encode an image and a caption: some faults of a config show only then, as exceptions of any type."""
    if clip.logit_scale.is_meta:
        return
    length = config["text_cfg"].get("context_length", DEFAULT_CONTEXT_LENGTH)
    with torch.no_grad():
        model = RetrievalModel(clip, preprocess).eval()
        images = model.encode_image(torch.zeros(1, 3, *height_and_width(preprocess["size"]), dtype=torch.uint8))
        texts = model.encode_text(torch.zeros(1, length, dtype=torch.int64), torch.tensor([length]))
        if not images.shape == texts.shape == (1, config["embed_dim"]):
            raise ValueError(f"its features have the shapes {tuple(images.shape)} and {tuple(texts.shape)}")
