"""Order the pairs of each epoch by the features of the model at its start: batches of near neighbours."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from clip_retrieval.data.batches.hard_negatives import Composer, Duplicates, find_same_bytes
from clip_retrieval.data.batches.loader import TrainBatch, TrainLoader
from clip_retrieval.data.batches.split import Split
from clip_retrieval.data.captions import Tokens
from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.encode import encode_captions, encode_images, encoding_model
from clip_retrieval.log import log
from clip_retrieval.models.towers import RetrievalModel

NEIGHBOURS = 64  # of each image or caption, among those that are left
TILE = {"cuda": 2**27, "mps": 2**25, "cpu": 2**23}  # cosines to compute at a time
ROWS = 4096  # cached features to project at a time


class HardNegatives:
    """A loader whose batches are composed of near neighbours.

    Args:
        loader: the loader of the batches; its sampler gets the order of each epoch.
        model: the model that is trained. It encodes in `precision`, as in an evaluation: no dropout, no augmentation.
        split: the train split, with the pixels of an evaluation.
        precision: "fp32", "bf16" or "fp16".
        batch_size: images or captions to encode at a time.
        num_workers: loader processes.
        device: the device of the model.
        processes: the process group; each encodes a part, and all compose the same batches.
    """

    def __init__(
        self,
        loader: TrainLoader,
        model: RetrievalModel,
        split: Split,
        *,
        precision: str,
        batch_size: int | None,
        num_workers: int | None,
        device: torch.device,
        processes: Processes = SINGLE_PROCESS,
    ):
        assert loader.sampler.hard_negatives is not None
        self.loader = loader
        self.sampler = loader.sampler
        self.share, self.side = loader.sampler.hard_negatives
        self.model = model
        self.split = split
        self.precision = precision
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.device = device
        self.processes = processes
        self.duplicates = _find_duplicates(split.dataset, processes)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[TrainBatch]:
        """The batches of an epoch, from batch number `first_batch` on. A resumed epoch keeps its order."""
        if not first_batch:
            self.sampler.order = None
            self.sampler.order = (epoch, self.compose(epoch))
        yield from self.loader.epoch(epoch, first_batch)

    @torch.inference_mode()
    def compose(self, epoch: int) -> np.ndarray:
        """Compose the batches of an epoch: int64 (batches, batch_size), rows of `pairs`."""
        # the pairs of the epoch, in random order
        random = self.sampler.draw(epoch)
        rows = random.ravel()
        images, captions = self.split.dataset.pairs[rows].T
        items = self.duplicates.image[images] if self.side == "image" else self.duplicates.caption[captions]
        distinct, entity = np.unique(items, return_inverse=True)

        # encode
        start = time.perf_counter()
        was_training = self.model.training
        try:
            features = self._encode_images(distinct) if self.side == "image" else self._encode_captions(distinct)
        finally:
            self.model.train(was_training)
        encoded = time.perf_counter()

        # compose; hard batches must not come first, nor the random pairs of a batch
        def find_neighbours(entities: np.ndarray) -> np.ndarray:
            chosen = features[torch.from_numpy(entities).to(features.device)]
            return find_nearest(chosen, NEIGHBOURS, self.processes).cpu().numpy()

        places, near = Composer(images, entity, self.duplicates, find_neighbours).compose(random.shape[1], self.share)
        rng = np.random.default_rng((self.sampler.seed, epoch, 1))
        places = rng.permuted(rng.permutation(places), axis=1)
        log.info(
            f"epoch {epoch + 1}: {100 * near / places.size:.1f}% of the pairs are hard negatives, by {self.side}; "
            f"encoded in {encoded - start:.1f} s, composed in {time.perf_counter() - encoded:.1f} s"
        )
        return rows[places]

    def _encode_images(self, images: np.ndarray) -> Tensor:
        """Encode the images, or project their cached features: float32 (n, dim)."""
        model, cached = encoding_model(self.model, self.precision), self.loader.images
        if isinstance(cached, Tensor):
            parts = cached[torch.from_numpy(images)].split(ROWS)
            return torch.cat([model.project_image(part.to(self.device)) for part in parts])
        features = encode_images(
            model.encode_image,
            self.split.pixels,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            device=self.device,
            processes=self.processes,
            skip_unreadable=self.loader.skips_unreadable,
        )
        return features[torch.from_numpy(images).to(self.device)]

    def _encode_captions(self, captions: np.ndarray) -> Tensor:
        """Encode the captions, or project their cached features: float32 (n, dim)."""
        model, cached = encoding_model(self.model, self.precision), self.loader.texts
        chosen = torch.from_numpy(captions)
        if isinstance(cached, Tensor):
            return torch.cat([model.project_text(part.to(self.device)) for part in cached[chosen].split(ROWS)])
        tokens = self.split.tokens
        return encode_captions(
            model.encode_text,
            [self.split.dataset.captions[caption] for caption in captions.tolist()],
            Tokens(tokens.ids[chosen], tokens.lengths[chosen], 0),
            trim=model.trims_text,
            batch_size=self.batch_size,
            device=self.device,
            processes=self.processes,
        )


def _find_duplicates(dataset: RetrievalDataset, processes: Processes) -> Duplicates:
    """Find duplicate images and captions; one process reads the files."""
    same = torch.zeros(len(dataset.images), dtype=torch.int64)
    if processes.is_main:
        same = torch.from_numpy(find_same_bytes(dataset))
    processes.broadcast({"same": same})
    return Duplicates.find(dataset, same.numpy())


@torch.inference_mode()
def find_nearest(features: Tensor, k: int, processes: Processes = SINGLE_PROCESS) -> Tensor:
    """Find the k other rows with the highest inner product with each row, in tiles.

    Args:
        features: float32 (n, dim).
        k: at most n; the row itself comes last.
        processes: each computes some of the tiles, whose size does not depend on their number.

    Returns:
        int32 (n, min(k, n)), nearest first.
    """
    tiles = torch.arange(len(features), device=features.device).split(
        max(1, TILE[features.device.type] // len(features))
    )
    found = [torch.empty(0, min(k, len(features)), dtype=torch.int32, device=features.device)]
    for rows in tiles[processes.rank :: processes.world_size]:
        scores = features[rows] @ features.T
        scores[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
        found.append(scores.topk(found[0].shape[1]).indices.int())
    order = torch.cat([rows for rank in range(processes.world_size) for rows in tiles[rank :: processes.world_size]])
    nearest = torch.cat(found)
    gathered = processes.all_gather_rows(nearest)
    return torch.empty_like(gathered).index_copy_(0, order, gathered)
