"""Score a model on a split: encode, rank, compute the metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clip_retrieval.data.captions import Tokens
from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.pixels.pixels import Pixels
from clip_retrieval.device import disable_tf32
from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.encode import encode_captions, encode_images, encoding_model
from clip_retrieval.evaluation.average_precision import average_precisions
from clip_retrieval.evaluation.bootstrap import Values, bootstrap_intervals
from clip_retrieval.evaluation.metrics import report
from clip_retrieval.evaluation.protocols import choose_protocols, score_protocols
from clip_retrieval.evaluation.ranks import Ranks, retrieval_ranks
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import EvalOptions


@dataclass
class SplitFeatures:
    """L2-normalised features of a split, float32 (images, dim) and (captions, dim), and the seconds of encoding."""

    images: Tensor
    captions: Tensor
    seconds: dict[str, float]


def encode_split(
    model: RetrievalModel,
    dataset: RetrievalDataset,
    tokens: Tokens,
    pixels: Pixels,
    options: EvalOptions,
    *,
    num_workers: int | None,
    device: torch.device,
    processes: Processes = SINGLE_PROCESS,
) -> SplitFeatures:
    """Encode each image and each distinct caption of a split once. The model keeps its training mode."""
    training = model.training
    shared: dict[str, Any] = {"batch_size": options.eval_batch_size, "device": device, "processes": processes}
    started = time.perf_counter()
    encoder = encoding_model(model, options.eval_precision)
    # Eager: the compiled graphs of training are specialised to its batch shapes.
    with disable_tf32(), torch.compiler.set_stance("force_eager"):
        images = encode_images(encoder.encode_image, pixels, num_workers=num_workers, **shared)
        images_done = _now(device)
        captions = encode_captions(encoder.encode_text, dataset.captions, tokens, trim=encoder.trims_text, **shared)
        captions_done = _now(device)
    model.train(training)
    return SplitFeatures(images, captions, {"images": images_done - started, "captions": captions_done - images_done})


def _now(device: torch.device) -> float:
    """The time after the device has finished all queued work, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def score(
    encoded: SplitFeatures,
    dataset: RetrievalDataset,
    options: EvalOptions,
    processes: Processes = SINGLE_PROCESS,
    *,
    full: bool = False,
) -> tuple[dict[str, Any], tuple[Ranks, Ranks]]:
    """Compute the block of results.json for a split, and the ranks of the images and of the captions.

    The block has sizes, metrics of both directions in percent, and seconds. If it is `full`, as for all evaluations but
    those of each epoch, it also has bootstrap intervals and the protocols.
    """
    started = time.perf_counter()
    i2t, t2i = retrieval_ranks(
        encoded.images,
        encoded.captions,
        dataset.pairs,
        image_name=dataset.images.name,
        text_name=dataset.captions.__getitem__,
        processes=processes,
    )
    metrics = report(i2t, t2i, options.recall_k)
    precisions: dict[str, Values] = {}
    if options.map:  # from the exact top items, which ranks do not list
        precisions = average_precisions(encoded.images, encoded.captions, dataset.pairs, processes=processes)
        for direction, values in precisions.items():
            metrics[direction] |= {name: float(value.mean()) for name, value in values.items()}
    seconds = encoded.seconds | {"ranks": time.perf_counter() - started}
    if full:
        started = time.perf_counter()
        metrics["intervals"] = bootstrap_intervals(i2t, t2i, dataset.pairs, options.recall_k, further=precisions)
        seconds["intervals"] = time.perf_counter() - started
        if protocols := choose_protocols(options.protocols, dataset):
            metrics["protocols"] = score_protocols(protocols, encoded.images, encoded.captions, dataset, processes)
            seconds["protocols"] = time.perf_counter() - started - seconds["intervals"]
    block = {
        "dataset": dataset.name,
        "split": dataset.split,
        "precision": options.eval_precision,
        "images": len(dataset.images),
        "captions": len(dataset.captions),
        **metrics,
        "seconds": seconds | {"total": sum(seconds.values())},
    }
    return block, (i2t, t2i)
