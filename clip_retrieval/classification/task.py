"""Zero-shot classification of labelled images, prepared once and scored as often as one likes.

task = prepare_task(ZeroShotData("cifar100", root), tokenizer, preprocess)
block = score_task(model, task, device=device)
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
from clip_retrieval.classification.labelled import LabelledImages
from clip_retrieval.classification.labelled_sets import ZeroShotData, read_labelled
from clip_retrieval.classification.templates import Templates
from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.evaluation.neighbours import nearest
from clip_retrieval.evaluation.ranks import retrieval_ranks
from clip_retrieval.evaluation.scores import Features, scoring_device
from clip_retrieval.log import log
from clip_retrieval.models.towers import RetrievalModel


@dataclass(frozen=True)
class ZeroShotTask:
    """Labelled images and the prompts of their classes, for a model's tokenizer and preprocessing."""

    labelled: LabelledImages
    templates: Templates
    prompt_classes: PromptedImages


def prepare_task(wanted: ZeroShotData, tokenizer: Any, preprocess: dict[str, Any]) -> ZeroShotTask:
    """Read what is to be classified, for the model with this tokenizer and this preprocessing, and say what it is.

    Raises UserError, naming the file or the folder, where one is missing or not as it should be.
    """
    return task_of(*read_labelled(wanted), tokenizer, preprocess)


def task_of(labelled: LabelledImages, templates: Templates, tokenizer: Any, preprocess: dict[str, Any]) -> ZeroShotTask:
    """The task of classifying labelled images that are read already."""
    log.info(
        f"{labelled.name}: {len(labelled.images):,} images of {len(labelled.class_names):,} classes, templates: "
        f"{templates.name} ({len(templates.texts)})"
    )
    names = list(labelled.class_names)
    return ZeroShotTask(
        labelled, templates, prompt_classes(labelled.name, labelled.images, names, templates, tokenizer, preprocess)
    )


def score_task(
    model: RetrievalModel,
    task: ZeroShotTask,
    *,
    device: torch.device,
    eval_batch_size: int | None = None,
    num_workers: int | None = None,
    precision: str = "fp32",
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, Any]:
    """The block of results.json: sizes, accuracy in percent (see `accuracy_report`), and seconds.

    The model, on `device`, keeps the mode it is in. Processes that share the work all get the block.
    """
    features = task.prompted.encode(
        model,
        device=device,
        eval_batch_size=eval_batch_size,
        num_workers=num_workers,
        precision=precision,
        processes=processes,
    )
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
        "precision": precision,
        "template_set": task.templates.name,
        "templates": list(task.templates.texts),
        "images": len(labelled.images),
        "classes": len(labelled.class_names),
        **report,
        "seconds": seconds | {"total": sum(seconds.values())},
        "per_class": per_class,
    }


def _best_classes(images: Tensor, classes: Tensor, processes: Processes) -> np.ndarray:
    """int64 (images,): the class of each image that scores best, the first of those that score the same."""
    device = scoring_device(images, None)
    sides = (Features(images, device, "image", str), Features(classes, device, "caption", str))
    return nearest(*sides, 1, directions=("i2t",), processes=processes)["i2t"].items[:, 0]
