"""Score a split with the methods of --rerank; their parameters are chosen on the val split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from clip_retrieval.data.catalog import is_streamed, read_dataset
from clip_retrieval.data.dataset import UNSPLIT, RetrievalDataset
from clip_retrieval.data.images.image_files import ImageArray
from clip_retrieval.distributed import Processes
from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.bootstrap import bootstrap_values, first_images, rank_values, to_intervals
from clip_retrieval.evaluation.evaluator import SplitFeatures
from clip_retrieval.evaluation.metrics import STANDARD_K, report, retrieval_metrics
from clip_retrieval.evaluation.ranks import retrieval_ranks
from clip_retrieval.evaluation.rerank import METHODS, Method
from clip_retrieval.log import log
from clip_retrieval.options import DataOptions
from clip_retrieval.run.ensemble import Ensemble
from clip_retrieval.run.splits import read_split


def rerank(
    ensemble: Ensemble, encoded: SplitFeatures, dataset: RetrievalDataset, bank_captions: list[str] | None
) -> dict[str, dict[str, Any]]:
    """Compute the block of results.json of each method of --rerank, by name.

    Args:
        ensemble: the model or models, to encode the val split and the bank.
        encoded: the features of the split.
        dataset: the split that is scored.
        bank_captions: see `read_bank`.
    """
    options = ensemble.options
    names = options.evaluation.rerank or ()
    # features: training captions, and the val split to choose parameters on
    bank = None
    if bank_captions is not None:
        no_images, no_pairs = ImageArray(np.empty((0, 1, 1, 3), np.uint8), "bank"), np.empty((0, 2), np.int64)
        bank = ensemble.encode(RetrievalDataset("qb_norm's bank", "train", no_images, bank_captions, no_pairs)).captions
    val = None
    if dataset.split == "test":
        val = read_split(options.data, "val", ensemble.device, ensemble.processes, require_pairs=False)
    encoded_val = ensemble.encode(val) if val is not None and val.split != UNSPLIT else None
    if encoded_val is None:
        log.info("re-ranking: there is no val split to choose parameters on; they are the papers' defaults")
    # choose and score
    blocks = {}
    shared: dict[str, Any] = {"recall_k": options.evaluation.recall_k, "processes": ensemble.processes}
    for name in names:
        method = METHODS[name]
        value, chosen_on = method.default, "default"
        if val is not None and encoded_val is not None:
            sums = [_recall_sum(metrics) for metrics in _score(method, encoded_val, val, method.grid, bank, **shared)]
            value, chosen_on = method.grid[int(np.argmax(sums))], "val"
        (metrics,) = _score(method, encoded, dataset, (value,), bank, **shared, intervals=True)
        number = {"bank": len(bank)} if method.needs_bank and bank is not None else {}
        blocks[name] = {"uses": method.uses, **number, method.parameter: value, "chosen_on": chosen_on, **metrics}
    return blocks


def _score(
    method: Method,
    encoded: SplitFeatures,
    dataset: RetrievalDataset,
    values: tuple[float, ...],
    bank: Tensor | None,
    recall_k: tuple[int, ...],
    processes: Processes,
    intervals: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield the metrics of the directions that a method changes, for each value of its parameter."""
    extra = (bank,) if method.needs_bank else ()
    for images, texts in method.transform(encoded.images, encoded.captions, values, *extra):
        i2t, t2i = retrieval_ranks(images, texts, dataset.pairs, processes=processes)
        both = "i2t" in method.directions
        block = report(i2t, t2i, recall_k) if both else {"t2i": retrieval_metrics(t2i, recall_k)}
        if intervals:
            own = ({"i2t": rank_values(i2t, recall_k)} if both else {}) | {"t2i": rank_values(t2i, recall_k)}
            queries = {"i2t": i2t.queries, "t2i": first_images(dataset.pairs, t2i.queries)}
            block["intervals"] = to_intervals(bootstrap_values(own, queries))
        yield block


def _recall_sum(metrics: dict[str, Any]) -> float:
    """The sum of R@1, R@5 and R@10 of the directions in `metrics`."""
    return sum(metrics[direction][f"R@{k}"] for direction in ("i2t", "t2i") if direction in metrics for k in STANDARD_K)


def read_bank(options: DataOptions, methods: Iterable[str], number: int, seed: int) -> list[str] | None:
    """Read a random choice of at most `number` distinct training captions, or None if no method needs them.

    Raises UserError if there are none.
    """
    if not any(METHODS[name].needs_bank for name in methods):
        return None
    train = None if is_streamed(options) else read_dataset(options, "train")
    if train is None or train.split == UNSPLIT:
        raise UserError(
            f"--rerank qb_norm needs training captions, and {options.name} has no train split that can be read at "
            "once; drop qb_norm"
        )
    captions = list(dict.fromkeys(train.captions))
    chosen = np.random.default_rng(seed).permutation(len(captions))[:number]
    return [captions[row] for row in np.sort(chosen)]
