"""Features of a whole data set: each image once, each distinct caption once."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from clip_retrieval.data.captions import Tokens
from clip_retrieval.data.dataset import Images
from clip_retrieval.data.loader import choose_num_workers, image_batches
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.training.precision import DTYPES


def encoding_model(model: RetrievalModel, precision: str) -> RetrievalModel:
    """`model` ready to encode: in evaluation mode, with its weights in `precision` (a copy, unless it is fp32)."""
    if precision != "fp32":
        mean, std = model.mean, model.std
        model = copy.deepcopy(model).to(DTYPES[precision])
        model.mean, model.std = mean, std  # the pixels are normalised in float32
    return model.eval()


@torch.inference_mode()
def encode_images(
    model: RetrievalModel, images: Images, *, batch_size: int, num_workers: int | None, device: torch.device
) -> torch.Tensor:
    """float32 (images, dim) on `device`, L2-normalised."""
    batches = image_batches(
        images,
        model.preprocess,
        batch_size=batch_size,
        num_workers=choose_num_workers(num_workers, images, device),
        pin_memory=device.type == "cuda",
    )
    features = [
        model.encode_image(pixels.to(device, non_blocking=True))
        for pixels in tqdm(batches, total=-(-len(images) // batch_size), desc="images", leave=False, disable=None)
    ]
    return torch.cat(features)


@torch.inference_mode()
def encode_captions(
    model: RetrievalModel, captions: Sequence[str], tokens: Tokens, *, batch_size: int, device: torch.device
) -> torch.Tensor:
    """float32 (captions, dim) on `device`, L2-normalised.

    Equal captions are encoded once; captions of like length go together, so that little padding is computed.
    """
    index_of: dict[str, int] = {}
    distinct = torch.tensor([index_of.setdefault(caption, len(index_of)) for caption in captions])
    first = torch.from_numpy(np.unique(distinct.numpy(), return_index=True)[1])
    by_length = tokens.lengths[first].argsort(stable=True)
    batches = by_length.split(batch_size)
    encoded = []
    for rows in tqdm(batches, desc="captions", leave=False, disable=None):
        length = int(tokens.lengths[first[rows]].max()) if model.trims_text else None
        encoded.append(model.encode_text(tokens.ids[first[rows], :length].long().to(device, non_blocking=True)))
    position = torch.empty_like(by_length)
    position[by_length] = torch.arange(len(by_length))
    return torch.cat(encoded)[position[distinct].to(device)]
