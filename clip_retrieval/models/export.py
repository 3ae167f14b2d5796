"""Checkpoints of ours, written as another system reads them."""

from __future__ import annotations

from pathlib import Path

import torch

from clip_retrieval.errors import UserError
from clip_retrieval.files import write_atomic
from clip_retrieval.models import chinese_clip
from clip_retrieval.models.weights import read_checkpoint


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
    with write_atomic(output) as file:
        torch.save({"epoch": content["epoch"], "step": content["step"], "name": "", "state_dict": state}, file)
