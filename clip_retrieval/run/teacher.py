"""The teacher of --distill_from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from clip_retrieval.data.batches.train_split import IndexedTrainSplit, TrainSplit
from clip_retrieval.data.captions import tokenize
from clip_retrieval.data.catalog import skips_unreadable
from clip_retrieval.data.pixels.transforms import model_size
from clip_retrieval.device import DTYPES
from clip_retrieval.distributed import Processes
from clip_retrieval.encode import encode_captions, encode_images
from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.models.projection import embedding_dim
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import Options
from clip_retrieval.run.model import load_model
from clip_retrieval.run.settings import settle_options
from clip_retrieval.training.distillation import Distillation

START = "start"
START_FILE = "start.pt"
"""The weights that a run with --distill_from start began with, beside its checkpoints."""
PROBE = ["a photo of two dogs, in the snow!"]


def make_distillation(
    options: Options,
    student: RetrievalModel,
    tokenizer: Any,
    train: TrainSplit,
    *,
    resumed: Path | None,
    caches: bool,
    precision: str,
    device: torch.device,
    processes: Processes,
) -> Distillation | None:
    """Load the teacher of --distill_from; None without the option. See `load_teacher` for the arguments.

    With caches=True, the teacher encodes the train split here, if the inputs are the same in every epoch.
    """
    if not options.loss.distill_from:
        return None
    teacher = load_teacher(options, student, tokenizer, resumed=resumed, precision=precision, device=device)
    distillation = Distillation(teacher, options.loss.distill_kind, options.loss.distill_weight, processes)
    data = options.data
    varies = data.augment != "none" or data.word_dropout or skips_unreadable(data)
    if caches and not varies and not options.train.no_feature_cache and isinstance(train, IndexedTrainSplit):
        log.info("the teacher encodes all images and captions once, before the first step")
        shared: dict[str, Any] = {
            "batch_size": options.evaluation.eval_batch_size,
            "device": device,
            "processes": processes,
        }
        split, texts = train.data, train.data.dataset.texts
        images = encode_images(teacher.encode_image, split.pixels, num_workers=data.num_workers, **shared)
        captions = encode_captions(teacher.encode_text, texts, split.tokens, trim=teacher.trims_text, **shared)
        # unlike inference tensors, clones can be part of a graph
        distillation.features = images.cpu().clone(), captions.cpu().clone()
    return distillation


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
