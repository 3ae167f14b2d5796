"""A teacher beside the model that is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clip_retrieval.data.batches.loader import TrainBatch
from clip_retrieval.distributed import Processes
from clip_retrieval.losses.distillation import feature_distillation, relational_distillation
from clip_retrieval.models.towers import RetrievalModel


class Distillation:
    """The weighted distillation loss of a batch; the teacher sees the batch that the student sees, without dropout.

    Args:
        teacher: the teacher, on the device of the batches, in the precision of its features.
        kind: "feature" or "relational", see `losses.distillation`.
        weight: factor on the loss.
        processes: the process group that shares a batch.

    Attributes:
        features: of all images and all captions, (images, dim) and (captions, dim) on the CPU; None: the teacher
            encodes each batch.
    """

    def __init__(self, teacher: RetrievalModel, kind: str, weight: float, processes: Processes):
        self.teacher = teacher.eval().requires_grad_(False)
        self.kind = kind
        self.weight = weight
        self.processes = processes
        self.features: tuple[Tensor, Tensor] | None = None

    def __call__(
        self, batch: TrainBatch, chunks: Sequence[slice], student: Sequence[Tensor], all_texts: Tensor
    ) -> Tensor:
        """Compute this process's part of the loss.

        Args:
            batch: this process's part of the batch.
            chunks: its rows that the teacher encodes at a time.
            student: image features (n, dim) and text features (texts, dim) of this process, and the logit scale.
            all_texts: caption features of all processes, in the order of the loss.
        """
        images, texts = self._encode(batch, chunks)
        if self.kind == "feature":
            captions = slice(None, None, 1 if batch.text_rows is None else 2)  # without negative captions
            found = feature_distillation([student[0], student[1][captions]], [images, texts[captions]], self.processes)
            return self.weight * found
        teacher = [images, batch.select_texts(self.processes.all_gather(texts))]
        scale = self.teacher.clip.logit_scale.exp()
        loss = relational_distillation([student[0], all_texts], teacher, student[2], scale, self.processes)
        return self.weight * loss

    @torch.no_grad()
    def _encode(self, batch: TrainBatch, chunks: Sequence[slice]) -> list[Tensor]:
        if self.features is not None and batch.rows is not None:
            found = [features[rows] for features, rows in zip(self.features, batch.rows, strict=True)]
            return [rows.to(batch.positives.device, non_blocking=True) for rows in found]
        parts = [self.teacher(*batch.part(rows)) for rows in chunks]
        return [torch.cat(features) for features in zip(*parts, strict=True)]
