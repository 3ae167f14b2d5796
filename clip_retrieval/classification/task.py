"""Zero-shot classification of labelled images: prepared once, scored any number of times.

task = prepare_task(ZeroShotData("cifar100", root), tokenizer, preprocess)
block = score_task(model, task, EvalOptions(), num_workers=None, device=device)
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_retrieval.classification.accuracy import accuracy_report
from clip_retrieval.classification.embeddings import PromptedImages, prompt_classes
from clip_retrieval.classification.folder import LabelledImages
from clip_retrieval.classification.labelled_sets import ZeroShotData, read_labelled
from clip_retrieval.classification.templates import Templates
from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.errors import format_count
from clip_retrieval.evaluation.neighbours import nearest
from clip_retrieval.evaluation.ranks import retrieval_ranks
from clip_retrieval.evaluation.scores import Features, scoring_device
from clip_retrieval.log import log
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import EvalOptions


@dataclass(frozen=True)
class ZeroShotTask:
    """Labelled images and their class prompts, for a model's tokenizer and preprocessing."""

    labelled: LabelledImages
    templates: Templates
    inputs: PromptedImages


def prepare_task(request: ZeroShotData, tokenizer: Any, preprocess: dict[str, Any]) -> ZeroShotTask:
    """Read the data of a classification and log it. tokenizer and preprocess are the model's.

    Raises UserError, naming the file or folder, if it is missing or invalid.
    """
    return make_task(*read_labelled(request), tokenizer, preprocess)


def make_task(
    labelled: LabelledImages, templates: Templates, tokenizer: Any, preprocess: dict[str, Any]
) -> ZeroShotTask:
    """Prepare the classification of labelled images."""
    counts = f"{format_count(len(labelled.images), 'image')} of {format_count(len(labelled.class_names), 'class')}"
    log.info(f"{labelled.name}: {counts}, templates: {templates.name} ({len(templates.texts)})")
    names = list(labelled.class_names)
    return ZeroShotTask(
        labelled, templates, prompt_classes(labelled.name, labelled.images, names, templates, tokenizer, preprocess)
    )


def score_task(
    model: RetrievalModel,
    task: ZeroShotTask,
    options: EvalOptions,
    *,
    num_workers: int | None,
    device: torch.device,
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Compute the block of results.json: sizes, accuracy in percent (see `accuracy_report`), and seconds.

    The model must be on `device`; its training mode stays. Processes that share the work all get the block.
    """
    # encode images and prompts
    features = task.inputs.encode(model, options, num_workers=num_workers, device=device, processes=processes)
    # rank each image's own class among all classes
    labelled = task.labelled
    started = time.perf_counter()
    ranks, _ = retrieval_ranks(
        features.images,
        features.classes,
        np.stack([np.arange(len(labelled.labels)), labelled.labels], axis=1),
        image_name=labelled.images.name,
        text_name=labelled.class_names.__getitem__,
        processes=processes,
    )
    predicted = _best_classes(features.images, features.classes, processes)
    report = accuracy_report(ranks, predicted, labelled.labels, labelled.class_names)
    per_class = report.pop("per_class")
    seconds = features.seconds | {"ranks": time.perf_counter() - started}
    return {
        "dataset": labelled.name,
        "data_root": labelled.place and str(labelled.place.absolute()),
        "class_names": labelled.names_file and str(labelled.names_file.absolute()),
        "precision": options.eval_precision,
        "template_set": task.templates.name,
        "templates": list(task.templates.texts),
        "images": len(labelled.images),
        "classes": len(labelled.class_names),
        **report,
        "seconds": seconds | {"total": sum(seconds.values())},
        "per_class": per_class,
    }


def _best_classes(images: Tensor, classes: Tensor, processes: Processes) -> np.ndarray:
    """int64 (images,): the best-scoring class of each image, the first one if several are equal."""
    device = scoring_device(images, None)
    sides = (Features(images, device, "image", str), Features(classes, device, "caption", str))
    return nearest(*sides, 1, directions=("i2t",), processes=processes)["i2t"].items[:, 0]
