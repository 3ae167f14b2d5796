"""Features of frozen towers, and of a teacher, computed once for all epochs."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_retrieval.data.captions import Tokens
from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.pixels.pixels import Pixels
from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.encode import Encode, encode_captions, encode_images


def encode_frozen_images(
    encode: Encode,
    pixels: Pixels,
    *,
    batch_size: int | None,
    num_workers: int | None,
    device: torch.device,
    processes: Processes = SINGLE_PROCESS,
) -> Tensor:
    """Encode the images once; `encode` and the pixels must be the same in every epoch: no random crops.

    Returns:
        float32 (images, width), on the CPU.
    """
    features = encode_images(
        encode,
        pixels,
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        processes=processes,
    )
    return features.cpu().clone()  # unlike an inference tensor, a clone can be part of a graph


def encode_frozen_texts(
    encode: Encode,
    dataset: RetrievalDataset,
    tokens: Tokens,
    *,
    trim: bool,
    batch_size: int | None,
    device: torch.device,
    processes: Processes = SINGLE_PROCESS,
) -> Tensor:
    """Encode the captions and negative captions once; see `encode_captions` for `trim`.

    Returns:
        float32 (texts, width), on the CPU.
    """
    features = encode_captions(
        encode,
        dataset.texts,
        tokens,
        trim=trim,
        batch_size=batch_size,
        device=device,
        processes=processes,
    )
    return features.cpu().clone()
