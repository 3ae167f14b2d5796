"""Further protocols of a split from the same features: 1K folds, ECCV Caption, CxC, and R-Precision.

- coco_1k: the mean over consecutive folds of 1,000 images and their captions, each ranked by itself; COCO's test split
  has five. Images beyond the last full fold are left out.
- eccv: the verified positives of ECCV Caption (Chun et al., arXiv:2204.03359), for 1,261 images and 1,332 captions of
  COCO's test split. The gallery is the whole split.
- cxc: the positives of Crisscrossed Captions (Parekh et al., arXiv:2004.15020), as the eccv-caption package has them.
- map_at_r: R-Precision and mAP@R with the positives of the data set; see `average_precision`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from clip_retrieval.data.dataset import RetrievalDataset
from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.average_precision import precisions_at_r
from clip_retrieval.evaluation.bootstrap import (
    Values,
    bootstrap_report,
    bootstrap_values,
    first_images,
    rank_values,
    to_intervals,
)
from clip_retrieval.evaluation.metrics import report, retrieval_metrics
from clip_retrieval.evaluation.ranks import Ranks, retrieval_ranks
from clip_retrieval.evaluation.scores import Features, scoring_device
from clip_retrieval.files import read_json
from clip_retrieval.log import log

FOLD = 1000  # images
EXTENDED = ("eccv", "cxc")
"""The protocols with positives of the eccv-caption package."""


def choose_protocols(names: Sequence[str], dataset: RetrievalDataset) -> list[str]:
    """Resolve --protocols: `auto` is all protocols of COCO for its test split of 5,000 images, else none.

    A protocol of `auto` that cannot be computed is left out, with a line in the log. Raises UserError for one that was
    named, see `check_protocols`.
    """
    check_protocols(names, dataset)
    chosen = [name for name in dict.fromkeys(names) if name not in ("auto", "none")]
    if "auto" in names and (dataset.name, dataset.split, len(dataset.images)) == ("coco", "test", 5 * FOLD):
        for name in ("coco_1k", *EXTENDED):
            try:
                check_protocols([name], dataset)
            except UserError as error:
                log.info(f"left out: {error}")
                continue
            chosen.append(name)
    return list(dict.fromkeys(chosen))


def check_protocols(names: Sequence[str], dataset: RetrievalDataset) -> None:
    """Raise UserError if a protocol needs other data, or a package that is not installed."""
    for name in EXTENDED:
        if name in names:
            read_positives(name, dataset)
    if "coco_1k" in names and len(dataset.images) < FOLD:
        raise UserError(f"--protocols coco_1k: needs at least {FOLD:,} images, not {dataset.describe()}; drop it")


def score_protocols(
    names: Sequence[str],
    images: Tensor,
    captions: Tensor,
    dataset: RetrievalDataset,
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, dict[str, Any]]:
    """Compute {protocol: {"i2t": {metric: percent}, "t2i": ..., "intervals": ...}}.

    images and captions are features (images, dim) and (captions, dim). "intervals" has the bootstrap interval of each
    figure, in the structure of the protocol. See `choose_protocols` for the errors.
    """
    blocks: dict[str, dict[str, Any]] = {}
    for name in names:
        if name == "coco_1k":
            blocks[name] = _score_folds(images, captions, dataset.pairs, processes)
            continue
        pairs = read_positives(name, dataset) if name in EXTENDED else dict.fromkeys(("i2t", "t2i"), dataset.pairs)
        ranks = _rank(images, captions, pairs, processes) if name in EXTENDED else {}
        block: dict[str, Any] = {direction: retrieval_metrics(own) for direction, own in ranks.items()}
        if name == "cxc":
            block = report(ranks["i2t"], ranks["t2i"])  # with the sum of the recalls
        values: dict[str, Values] = {direction: rank_values(own) for direction, own in ranks.items()}
        queries = {direction: own.queries for direction, own in ranks.items()}
        if name != "cxc":  # whose figures are recalls
            for direction, own in _compute_r_precision(images, captions, pairs, processes).items():
                block.setdefault(direction, {}).update({key: float(np.nanmean(value)) for key, value in own.items()})
                rows = queries.setdefault(direction, np.flatnonzero(np.isfinite(own["R-P"])))
                values.setdefault(direction, {}).update({key: value[rows] for key, value in own.items()})
        queries["t2i"] = first_images(dataset.pairs, queries["t2i"])
        intervals = to_intervals(bootstrap_values(values, queries))
        blocks[name] = block | {"intervals": {key: intervals[key] for key in block}}
    return blocks


def read_positives(name: str, dataset: RetrievalDataset) -> dict[str, np.ndarray]:
    """Read the positives of a protocol, {direction: int64 (P, 2) of (image index, caption index)}.

    Each direction has its own: not every positive of an image's query is one of a caption's query. The caption is -1
    for the two captions of ECCV Caption that COCO's test split of 25,000 lacks. Raises UserError if eccv-caption is not
    installed, or the data set lacks other images or captions.
    """
    pairs = read_known_positives(name, dataset)
    if pairs is None:
        raise UserError(f"--protocols {name}: needs the positives of eccv-caption; pip install eccv-caption")
    if sum(np.count_nonzero(found.min(axis=1) < 0) for found in pairs.values()) > 2:
        raise UserError(
            f"--protocols {name}: {dataset.describe()}, lacks images or captions of COCO's test split; choose that "
            "one, or drop the protocol"
        )
    return {direction: np.unique(found, axis=0) for direction, found in pairs.items()}


def read_known_positives(name: str, dataset: RetrievalDataset) -> dict[str, np.ndarray] | None:
    """Read positives as `read_positives` does, with -1 for any image or caption that the data set lacks.

    None if eccv-caption is not installed. Its files are read without importing it, which takes seconds.
    """
    spec = importlib.util.find_spec("eccv_caption")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0], "data")
    images, texts = ({str(i): row for row, i in enumerate(ids or ())} for ids in (dataset.image_ids, dataset.text_ids))
    by_image = read_json(folder / f"{name}_image_to_caption.json").items()
    by_text = read_json(folder / f"{name}_caption_to_image.json").items()
    pairs = {
        "i2t": [(images.get(image, -1), texts.get(str(text), -1)) for image, found in by_image for text in found],
        "t2i": [(images.get(str(image), -1), texts.get(text, -1)) for text, found in by_text for image in found],
    }
    return {direction: np.array(found) for direction, found in pairs.items()}


def _score_folds(images: Tensor, captions: Tensor, pairs: np.ndarray, processes: Processes) -> dict[str, Any]:
    blocks, drawn = [], []
    for start in range(0, len(images) - FOLD + 1, FOLD):
        own = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < start + FOLD)]
        texts, numbers = np.unique(own[:, 1], return_inverse=True)
        fold = np.stack([own[:, 0] - start, numbers], axis=1)
        i2t, t2i = retrieval_ranks(images[start : start + FOLD], captions[texts], fold, processes=processes)
        blocks.append(report(i2t, t2i))
        drawn.append(
            bootstrap_report(i2t, t2i, first_images(fold, t2i.queries), seed=start)
        )  # each fold its own images
    return _average(blocks) | {"intervals": to_intervals(_average(drawn)), "folds": len(blocks)}


def _average(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of reports that have numbers or arrays."""
    return {
        name: _average([block[name] for block in blocks])
        if isinstance(value, dict)
        else sum(block[name] for block in blocks) / len(blocks)
        for name, value in blocks[0].items()
    }


def _rank(images: Tensor, captions: Tensor, pairs: dict[str, np.ndarray], processes: Processes) -> dict[str, Ranks]:
    """Rank the queries of each direction with its own positives."""
    ranks = {}
    for direction, column in (("i2t", 0), ("t2i", 1)):
        # only the queries of the protocol are ranked
        known = pairs[direction][pairs[direction].min(axis=1) >= 0]
        rows, known[:, column] = np.unique(known[:, column], return_inverse=True)
        left, right = (images[rows], captions) if direction == "i2t" else (images, captions[rows])
        own = retrieval_ranks(left, right, known, processes=processes)[column]
        ranks[direction] = replace(own, queries=rows[own.queries])
    return ranks


def _compute_r_precision(
    images: Tensor, captions: Tensor, pairs: dict[str, np.ndarray], processes: Processes
) -> dict[str, Values]:
    """The R-Precision and mAP@R of all images and captions; NaN for those without positives."""
    device = scoring_device(images, None)
    sides = [Features(images, device, "image", str), Features(captions, device, "caption", str)]
    values = {}
    for direction, column in (("i2t", 0), ("t2i", 1)):
        relevant = np.bincount(pairs[direction][:, column], minlength=len(sides[column]))
        query, item = pairs[direction][pairs[direction].min(axis=1) >= 0][:, [column, 1 - column]].T
        values[direction] = precisions_at_r(sides[column], sides[1 - column], query, item, relevant, processes)
    return values
