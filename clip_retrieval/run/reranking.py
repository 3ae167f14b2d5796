"""Score a split with the methods of --rerank; their parameters are chosen on the val split."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from clip_retrieval.data.catalog import is_streamed, read_dataset
from clip_retrieval.data.dataset import UNSPLIT, RetrievalDataset
from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.evaluator import SplitFeatures
from clip_retrieval.evaluation.metrics import STANDARD_K, report, retrieval_metrics
from clip_retrieval.evaluation.ranks import retrieval_ranks
from clip_retrieval.evaluation.rerank import METHODS, Method
from clip_retrieval.log import log
from clip_retrieval.options import DataOptions
from clip_retrieval.run.ensemble import Ensemble
from clip_retrieval.run.splits import read_split


def rerank(ensemble: Ensemble, encoded: SplitFeatures, dataset: RetrievalDataset) -> dict[str, dict[str, Any]]:
    """Compute the block of results.json of each method of --rerank, by name.

    Args:
        ensemble: the model or models, to encode the val split and the training captions.
        encoded: the features of the split.
        dataset: the split that is scored.

    Raises UserError if a method needs training captions and there are none.
    """
    options = ensemble.options
    names = options.evaluation.rerank or ()
    # features: training captions, and the val split to choose parameters on
    bank = None
    if any(METHODS[name].needs_bank for name in names):
        captions = read_bank(options.data, options.evaluation.rerank_bank, options.train.seed)
        log.info(f"qb_norm: a bank of {len(captions):,} training captions")
        bank = ensemble.encode_texts(captions)
    val = None
    if dataset.split == "test":
        val = read_split(options.data, "val", ensemble.device, ensemble.processes, require_pairs=False)
    if val is None or val.split == UNSPLIT:
        log.info("re-ranking: there is no val split to choose parameters on; they are the papers' defaults")
        return {name: _score(METHODS[name], None, encoded, dataset, bank, ensemble) for name in names}
    encoded_val = ensemble.encode(val)
    # choose and score
    blocks = {}
    for name in names:
        value = _choose(METHODS[name], encoded_val, val, bank, ensemble)
        blocks[name] = _score(METHODS[name], value, encoded, dataset, bank, ensemble)
    return blocks


def _choose(
    method: Method, encoded: SplitFeatures, dataset: RetrievalDataset, bank: Tensor | None, ensemble: Ensemble
) -> float:
    """The value of the grid with the highest sum of recalls on the val split."""
    metrics = _metrics(method, method.grid, encoded, dataset, bank, ensemble)
    sums = [sum(block[direction][f"R@{k}"] for direction in method.directions for k in STANDARD_K) for block in metrics]
    return method.grid[int(np.argmax(sums))]


def _score(
    method: Method,
    value: float | None,
    encoded: SplitFeatures,
    dataset: RetrievalDataset,
    bank: Tensor | None,
    ensemble: Ensemble,
) -> dict[str, Any]:
    """The block of results.json of a method, with a value chosen on val, or with its default."""
    parameter = {method.parameter: method.default if value is None else value}
    (metrics,) = _metrics(method, tuple(parameter.values()), encoded, dataset, bank, ensemble)
    number = {"bank": len(bank)} if method.needs_bank and bank is not None else {}
    return {"uses": method.uses, **number, **parameter, "chosen_on": "default" if value is None else "val", **metrics}


def _metrics(
    method: Method,
    values: tuple[float, ...],
    encoded: SplitFeatures,
    dataset: RetrievalDataset,
    bank: Tensor | None,
    ensemble: Ensemble,
) -> list[dict[str, Any]]:
    """The metrics of the directions that a method changes, for each value of its parameter."""
    extra = (bank,) if method.needs_bank else ()
    recall_k, blocks = ensemble.options.evaluation.recall_k, []
    for images, texts in method.transform(encoded.images, encoded.captions, values, *extra):
        ranks = dict(zip(("i2t", "t2i"), retrieval_ranks(images, texts, dataset.pairs, processes=ensemble.processes)))
        if len(method.directions) == 2:
            blocks.append(report(ranks["i2t"], ranks["t2i"], recall_k))
        else:
            blocks.append({name: retrieval_metrics(ranks[name], recall_k) for name in method.directions})
    return blocks


def read_bank(options: DataOptions, number: int, seed: int) -> list[str]:
    """Read a random choice of at most `number` distinct training captions.

    Raises UserError if there are none.
    """
    train = None if is_streamed(options) else read_dataset(options, "train")
    if train is None or train.split == UNSPLIT:
        raise UserError(
            f"--rerank qb_norm needs training captions, and {options.name} has no train split that can be read at "
            "once; drop qb_norm"
        )
    captions = list(dict.fromkeys(train.captions))
    chosen = np.random.default_rng(seed).permutation(len(captions))[:number]
    return [captions[row] for row in np.sort(chosen)]
