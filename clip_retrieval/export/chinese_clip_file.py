"""A checkpoint in the layout of Chinese-CLIP's own code."""

from __future__ import annotations

from pathlib import Path

import torch

from clip_retrieval.api import ImageTextModel
from clip_retrieval.errors import UserError
from clip_retrieval.export.sample import Exported, Sample
from clip_retrieval.models import chinese_clip
from clip_retrieval.models.build import build_model
from clip_retrieval.options import ModelOptions

WEIGHTS_FILE = "weights.pt"
"""The only file: it is moved to the output."""


def write(model: ImageTextModel, folder: Path) -> None:
    """Write the checkpoint."""
    if not chinese_clip.is_chinese_clip(model.config):
        raise UserError(f"{model.name} is not a Chinese-CLIP model; choose another --format")
    state = chinese_clip.to_reference(model.model.clip.state_dict())
    torch.save({"epoch": 0, "step": 0, "name": "", "state_dict": state}, folder / WEIGHTS_FILE)


@torch.inference_mode()
def read(folder: Path, sample: Sample) -> Exported:
    """Compute the features of the model that the file defines."""
    clip = build_model(ModelOptions(pretrained=str(folder / WEIGHTS_FILE))).clip
    return Exported(clip.encode_image(sample.pixels), clip.encode_text(sample.tokens.ids))
