"""Load the teacher of --distill_from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_retrieval.data.batches.train_split import IndexedTrainSplit
from clip_retrieval.data.captions import tokenize
from clip_retrieval.data.catalog import is_streamed, skips_unreadable
from clip_retrieval.data.pixels.transforms import model_size
from clip_retrieval.device import DTYPES
from clip_retrieval.distributed import Processes
from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.models.checkpoint import Checkpoint
from clip_retrieval.models.projection import embedding_dim
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import Options
from clip_retrieval.run.model import load_model
from clip_retrieval.run.settings import settle_options
from clip_retrieval.training.frozen import encode_frozen_images, encode_frozen_texts

START = "start"
START_FILE = "start.pt"
"""The weights that a run with --distill_from start began with, beside its checkpoints."""
PROBE = ["a photo of two dogs, in the snow!"]


def load_teacher(
    options: Options,
    student: RetrievalModel,
    tokenizer: Any,
    *,
    resumed: Path | None,
    precision: str,
    device: torch.device,
) -> RetrievalModel:
    """Load the teacher: the student itself as the run starts, a checkpoint, or a model by its name.

    Args:
        options: the options of the run.
        student: the model that is trained, on its device.
        tokenizer: the student's.
        resumed: the folder of the checkpoint that the run resumes; None as it starts.
        precision: "fp32", "bf16" or "fp16".
        device: the device of the teacher.

    Raises:
        UserError: the file is missing, or the teacher needs other images, tokens or features than the student.
    """
    place = options.loss.distill_from or ""
    if place == START and resumed is None:
        teacher = copy.deepcopy(student)
    else:
        path = resumed / START_FILE if place == START and resumed is not None else Path(place)
        if place == START and not path.is_file():
            raise UserError(f"{path}: no such file; give the weights that the run started from as --distill_from")
        source = {"resume": str(path)} if path.is_file() else {"vision_model": place}
        typed = {"eval": True, "max_image_pixels": options.data.max_image_pixels, **source}
        try:
            teacher, built, own_tokenizer = load_model(*settle_options(typed))
        except UserError as error:
            missing = "" if path.is_file() else " no such file, and as a model:"
            raise UserError(f"--distill_from {place}:{missing} {error}") from None
        if model_size(built.preprocess) != model_size(student.preprocess):
            raise UserError(f"--distill_from {place}: its images have another size than the model's; give another one")
        ids = [tokenize(PROBE, each).ids for each in (tokenizer, own_tokenizer)]
        if not torch.equal(*ids) or student.trims_text > teacher.trims_text:
            raise UserError(f"--distill_from {place}: its tokenizer or context length differs; give another one")
    if options.loss.distill_kind == "feature" and embedding_dim(teacher.clip) != embedding_dim(student.clip):
        raise UserError(f"--distill_from {place}: its features have another width; use --distill_kind relational")
    teacher = teacher.to(device)
    return teacher if precision == "fp32" else teacher.copy_in(DTYPES[precision])


def caches_features(options: Options) -> bool:
    """Whether a teacher can encode the train split once: all its inputs are readable, and the same in every epoch."""
    data = options.data
    varies = data.augment != "none" or data.word_dropout or is_streamed(data) or skips_unreadable(data)
    return bool(options.loss.distill_from) and not varies and not options.train.no_feature_cache


def encode_split(
    teacher: RetrievalModel,
    train: IndexedTrainSplit,
    batch_size: int | None,
    device: torch.device,
    processes: Processes,
) -> tuple[Tensor, Tensor]:
    """Encode the train split with the teacher: features of images and of captions, on the CPU."""
    log.info("the teacher encodes all images and captions once, before the first step")
    split = train.data
    shared: dict[str, Any] = {"batch_size": batch_size, "device": device, "processes": processes}
    images = encode_frozen_images(teacher.encode_image, split.pixels, num_workers=train.num_workers, **shared)
    trim = teacher.trims_text
    return images, encode_frozen_texts(teacher.encode_text, split.dataset, split.tokens, trim=trim, **shared)


def copy_start(source: Path, folder: Path) -> None:
    """Copy start.pt from `source` to `folder` if the folders differ."""
    if source.resolve() != folder.resolve():
        Checkpoint.load(source / START_FILE).save(folder / START_FILE)
