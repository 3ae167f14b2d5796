"""Export checkpoints of ours to the formats of other systems."""

from __future__ import annotations

from pathlib import Path

import torch

from clip_retrieval.errors import UserError
from clip_retrieval.files import write_atomic
from clip_retrieval.models import chinese_clip
from clip_retrieval.models.checkpoint import Checkpoint


def export_chinese_clip(checkpoint: Path, output: Path) -> None:
    """Write a Chinese-CLIP checkpoint of ours in the format of Chinese-CLIP's own code.

    Raises UserError if `checkpoint` holds something else, or `output` exists.
    """
    content = Checkpoint.load_if_ours(checkpoint)
    if content is None or not chinese_clip.is_chinese_clip(content.model_config):
        raise UserError(f"{checkpoint} is not a checkpoint of ours with a Chinese-CLIP model; give one")
    if output.exists():
        raise UserError(f"{output} already exists; choose another name, or delete it")
    state = chinese_clip.to_reference(content.model)
    with write_atomic(output) as file:
        torch.save({"epoch": content.epoch, "step": content.step, "name": "", "state_dict": state}, file)
