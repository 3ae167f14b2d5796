"""Frozen towers: what they give for a split is computed once, and trained on in every epoch."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_retrieval.data.captions import Tokens
from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.pixels.pixels import Pixels
from clip_retrieval.device import autocast
from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.encode import encode_captions, encode_images
from clip_retrieval.models.towers import RetrievalModel


def encode_frozen_images(
    model: RetrievalModel,
    pixels: Pixels,
    *,
    batch_size: int | None,
    num_workers: int | None,
    precision: str,
    device: torch.device,
    processes: Processes = SINGLE_PROCESS,
) -> Tensor:
    """float32 (images, width), on the CPU: what the image tower gives before its projection.

    The pixels must be the same in every epoch: no random crops.
    """
    model.train()
    with autocast(precision, device):
        pooled = encode_images(
            model.pooled_image,
            pixels,
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            processes=processes,
        )
    return pooled.cpu().clone()  # (a clone is no inference tensor: a graph can be built on it)


def encode_frozen_texts(
    model: RetrievalModel,
    dataset: RetrievalDataset,
    tokens: Tokens,
    *,
    batch_size: int | None,
    precision: str,
    device: torch.device,
    processes: Processes = SINGLE_PROCESS,
) -> Tensor:
    """float32 (captions, width), on the CPU: what the text tower gives before its projection."""
    model.train()
    with autocast(precision, device):
        pooled = encode_captions(
            model.pooled_text,
            dataset.captions,
            tokens,
            trim=model.trims_text,
            batch_size=batch_size,
            device=device,
            processes=processes,
        )
    return pooled.cpu().clone()
