"""Scoring a model on a split: encode, rank, count."""

from __future__ import annotations

import time
from typing import Any

import torch

from clip_retrieval.data.captions import Tokens
from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.data.pixels import Pixels
from clip_retrieval.distributed import ALONE, Processes
from clip_retrieval.evaluation.encode import encode_captions, encode_images, encoding_model
from clip_retrieval.evaluation.metrics import report
from clip_retrieval.evaluation.ranks import retrieval_ranks
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.options import EvalOptions
from clip_retrieval.training.precision import true_float32


def score(
    model: RetrievalModel,
    dataset: RetrievalDataset,
    tokens: Tokens,
    pixels: Pixels,
    options: EvalOptions,
    *,
    num_workers: int | None,
    device: torch.device,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """The block of results.json for one split: sizes, both directions' metrics in percent, and seconds."""
    training = model.training
    shared = {"batch_size": options.eval_batch_size, "device": device, "processes": processes}
    started = time.perf_counter()
    encoder = encoding_model(model, options.eval_precision)
    # As they are: what training compiled knows its own batches only.
    with true_float32(), torch.compiler.set_stance("force_eager"):
        image_features = encode_images(encoder.encode_image, pixels, num_workers=num_workers, **shared)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # for the seconds
        images_done = time.perf_counter()
        text_features = encode_captions(
            encoder.encode_text, dataset.captions, tokens, trim=encoder.trims_text, **shared
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    captions_done = time.perf_counter()
    i2t, t2i = retrieval_ranks(
        image_features,
        text_features,
        dataset.pairs,
        image_name=dataset.images.name,
        text_name=dataset.captions.__getitem__,
        processes=processes,
    )
    metrics = report(i2t, t2i, options.recall_k)
    ended = time.perf_counter()
    model.train(training)
    return {
        "dataset": dataset.name,
        "split": dataset.split,
        "precision": options.eval_precision,
        "images": len(dataset.images),
        "captions": len(dataset.captions),
        **metrics,
        "seconds": {
            "images": images_done - started,
            "captions": captions_done - images_done,
            "ranks": ended - captions_done,
            "total": ended - started,
        },
    }
