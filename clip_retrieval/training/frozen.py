"""Features of frozen towers, computed once for all epochs."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_retrieval.data.captions import Tokens
from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.pixels.pixels import Pixels
from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.encode import encode_captions, encode_images, encoding_model
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
    """Encode the images with the frozen image tower, without its projection.

    The pixels must be the same in every epoch: no random crops.

    Returns:
        float32 (images, width), on the CPU.
    """
    pooled = encode_images(
        encoding_model(model, precision).pooled_image,
        pixels,
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        processes=processes,
    )
    return pooled.cpu().clone()  # unlike an inference tensor, a clone can be part of a graph


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
    """Encode the captions and negative captions with the frozen text tower, without its projection.

    Returns:
        float32 (texts, width), on the CPU.
    """
    pooled = encode_captions(
        encoding_model(model, precision).pooled_text,
        dataset.texts,
        tokens,
        trim=model.trims_text,
        batch_size=batch_size,
        device=device,
        processes=processes,
    )
    return pooled.cpu().clone()
