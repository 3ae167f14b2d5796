"""Encode a whole data set: each image once, each distinct caption once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from clip_retrieval.data.batches.loader import image_batches
from clip_retrieval.data.captions import Tokens
from clip_retrieval.data.pixels.jpeg import JpegBatch
from clip_retrieval.data.pixels.pixels import Pixels, choose_num_workers
from clip_retrieval.device import DTYPES
from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.log import progress_bar
from clip_retrieval.models.towers import RetrievalModel

IMAGE_BATCH_SIZE = {"cuda": 256, "mps": 64, "cpu": 32}
CAPTION_BATCH_SIZE = {"cuda": 1024, "mps": 256, "cpu": 64}  # a caption has about ten tokens, an image fifty or more

Encode = Callable[..., Tensor]


def encoding_model(model: RetrievalModel, precision: str) -> RetrievalModel:
    """Return the model in evaluation mode, with its weights in `precision` (a copy unless fp32)."""
    return (model if precision == "fp32" else model.copy_in(DTYPES[precision])).eval()


@torch.inference_mode()
def encode_images(
    encode: Encode,
    pixels: Pixels,
    *,
    batch_size: int | None,
    num_workers: int | None,
    device: torch.device,
    processes: Processes = SINGLE_PROCESS,
    skip_unreadable: bool = False,
) -> Tensor:
    """Encode all images. Returns float32 (images, dim) on `device`; (0, 0) without images.

    encode: maps uint8 (n, 3, height, width) to features (n, dim).
    processes: each encodes every world_size-th batch; all get all features.
    skip_unreadable: encode another image of its batch instead of an unreadable one, which raises UserError otherwise.
    """
    if len(pixels) == 0:
        return torch.empty(0, 0, device=device)
    batches = torch.arange(len(pixels)).split(batch_size or IMAGE_BATCH_SIZE[device.type])
    own = batches[processes.rank :: processes.world_size]
    loaded = image_batches(
        pixels,
        (range(int(rows[0]), int(rows[-1]) + 1) for rows in own),
        num_workers=choose_num_workers(num_workers, pixels, device),
        pin_memory=device.type == "cuda",
        skip_unreadable=skip_unreadable,
    )

    def load(images: Tensor | JpegBatch) -> Tensor:
        if skip_unreadable and isinstance(images, JpegBatch):
            return images.decode(device)[0]
        return images.to(device, non_blocking=True)

    bar = progress_bar(loaded, total=len(own), desc="images", leave=False)
    return _all_gather((encode(load(images)) for images in bar), batches, device, processes)


@torch.inference_mode()
def encode_captions(
    encode: Encode,
    captions: Sequence[str],
    tokens: Tokens,
    *,
    trim: bool,
    batch_size: int | None,
    device: torch.device,
    processes: Processes = SINGLE_PROCESS,
) -> Tensor:
    """Encode all captions. Returns float32 (captions, dim) on `device`.

    Equal captions are encoded once. Batches are sorted by length to reduce padding.

    encode: maps ids int64 (n, length) and lengths (n,) to features (n, dim).
    trim: cut the padding that all captions of a batch share.
    processes: each encodes every world_size-th batch; all get all features.
    """
    # first: the row of each distinct caption; distinct: the index into `first` of each caption
    index_of: dict[str, int] = {}
    distinct = torch.tensor([index_of.setdefault(caption, len(index_of)) for caption in captions])
    first = torch.from_numpy(np.unique(distinct.numpy(), return_index=True)[1])
    batches = tokens.lengths[first].argsort(stable=True).split(batch_size or CAPTION_BATCH_SIZE[device.type])
    own = batches[processes.rank :: processes.world_size]

    def encode_rows(rows: Tensor) -> Tensor:
        lengths = tokens.lengths[first[rows]]
        ids = tokens.ids[first[rows], : int(lengths.max()) if trim else None].long()
        return encode(ids.to(device, non_blocking=True), lengths)

    bar = progress_bar(own, desc="captions", leave=False)
    return _all_gather((encode_rows(rows) for rows in bar), batches, device, processes)[distinct.to(device)]


def _all_gather(
    own_features: Iterable[Tensor], batches: Sequence[Tensor], device: torch.device, processes: Processes
) -> Tensor:
    """The features of all batches of all processes, in row order."""
    parts = list(own_features)
    width = int(processes.max(torch.tensor(parts[0].shape[1] if parts else 0)))
    gathered = processes.all_gather_rows(torch.cat([*parts, torch.empty(0, width, device=device)]))
    world_size = processes.world_size
    rows = torch.cat([rows for rank in range(world_size) for rows in batches[rank::world_size]])
    features = torch.empty_like(gathered)
    features[rows.to(device)] = gathered
    return features
