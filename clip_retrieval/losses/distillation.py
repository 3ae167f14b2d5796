"""Losses that keep a student near its teacher, as in CLIP-KD (Yang et al. 2023, arXiv:2307.12732).

With student features x and teacher features y of the same batch, and probabilities p of its captions given an image
(and of its images given a caption), the softmax of logit scale times cosine:

    feature:     mean of 1 - cos(x, y), over the images and over the captions
    relational:  mean of KL(p teacher || p student), over the images and over the captions
"""

from __future__ import annotations

import torch
from torch import Tensor

from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.losses.infonce import log_sums
from clip_retrieval.losses.pairs import map_tiles


def feature_distillation(student: list[Tensor], teacher: list[Tensor], processes: Processes = SINGLE_PROCESS) -> Tensor:
    """Compute the mean of 1 - cosine.

    Args:
        student, teacher: image features and caption features, (n, dim) each, L2-normalised; of this process, with equal
            numbers in all processes.
        processes: the process group that shares the batch.

    Returns:
        The loss, a scalar; with several processes, the part of this process: the parts sum to the loss.
    """
    parts = [(1 - (own * other).sum(1)).mean() for own, other in zip(student, teacher, strict=True)]
    return torch.stack(parts).mean() / processes.world_size


def relational_distillation(
    student: list[Tensor],
    teacher: list[Tensor],
    student_scale: Tensor,
    teacher_scale: Tensor,
    processes: Processes = SINGLE_PROCESS,
) -> Tensor:
    """Compute the mean Kullback-Leibler divergence of the similarities in the batch, in tiles.

    Args:
        student, teacher: image features of this process, (images, dim), and caption features of all, (captions, dim),
            L2-normalised. The dims of student and teacher may differ.
        student_scale, teacher_scale: the factors on the cosines, scalars.
        processes: the process group that shares the batch.

    Returns:
        The loss, a scalar; with several processes, the part of this process: the parts sum to the loss.
    """
    # the normalisation of each softmax
    with torch.no_grad():
        teacher_rows, teacher_columns = log_sums(teacher[0], teacher[1], teacher_scale, processes)
    rows, columns = log_sums(student[0], student[1], student_scale, processes)
    number_of_rows, number_of_columns = len(rows) * processes.world_size, len(columns)

    def compute_tile(images: Tensor, texts: Tensor, student_scale: Tensor, teacher_scale: Tensor) -> Tensor:
        dims = [student[0].shape[1], teacher[0].shape[1], 1]
        image, teacher_image, row_sums = images.split(dims, dim=1)
        text, teacher_text, column_sums = texts.split(dims, dim=1)
        teacher_logits = teacher_scale * (teacher_image @ teacher_text.T)
        by_row = (teacher_logits - row_sums).exp() / number_of_rows
        by_column = (teacher_logits - column_sums.T).exp() / number_of_columns
        return ((by_row + by_column) * (teacher_logits - student_scale * (image @ text.T))).sum()

    # sum of p (log p - log q) = sum of p (teacher logit - student logit), - teacher log sum + student log sum
    images = torch.cat([student[0], teacher[0], teacher_rows[:, None]], dim=1)
    texts = torch.cat([student[1], teacher[1], teacher_columns[:, None]], dim=1)
    tiles = map_tiles(compute_tile, images, texts, student_scale, teacher_scale)
    i2t = (rows - teacher_rows).sum() / number_of_rows
    t2i = (columns - teacher_columns).mean() / processes.world_size  # every process has all columns
    return (torch.stack([tile for row in tiles for tile in row]).sum() + i2t + t2i) / 2
