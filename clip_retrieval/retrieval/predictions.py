"""Predictions on disk in Chinese-CLIP's format: write the items that each query retrieves, and score them.

    test_predictions.jsonl       {"text_id": 153915, "image_ids": [5791244, 1009692167, ...]}     text to image
    test_tr_predictions.jsonl    {"image_id": 977856234, "text_ids": [156914, 157914, ...]}       image to text

Answers (the gold file) have the same two forms: `_texts.jsonl`, with further keys allowed, and `.tr.jsonl`. Predictions
of both directions can be scored with either form.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_retrieval.errors import UserError, format_counts
from clip_retrieval.jsonl import Id, get_id, is_id, read_records, write_lines
from clip_retrieval.retrieval.features import FeatureFile, read_features

STANDARD_K = (1, 5, 10)  # as in evaluation.metrics, whose import loads torch
KEYS = {"t2i": ("text_id", "image_ids"), "i2t": ("image_id", "text_ids")}


@dataclass(frozen=True)
class Lists:
    """A list of item ids for each query id: answers or predictions.

    Attributes:
        direction: "t2i" (queries are texts, items are images) or "i2t".
        path: the file that was read.
        of: {query id: item ids}.
    """

    direction: str
    path: Path
    of: dict[Id, list[Id]]

    @property
    def query_key(self) -> str:
        return KEYS[self.direction][0]

    @property
    def items_key(self) -> str:
        return KEYS[self.direction][1]


def read_lists(path: Path, *, are_answers: bool = False) -> Lists:
    """Read predictions or answers. The keys of the first line determine the direction.

    Answers of a query may be on several lines. Raises UserError, naming file and line, for an invalid line, and for
    duplicate ids in predictions.
    """
    direction = None
    lists: dict[Id, dict[Id, None]] = {}  # dicts are ordered sets here
    for number, content in read_records(path):
        try:
            direction = direction or _infer_direction(content)
            query_key, items_key = KEYS[direction]
            query, items = get_id(content, query_key), _get_items(content, items_key, are_answers)
            if not are_answers and query in lists:
                raise ValueError(f"{query_key} {query!r} has predictions already")
            lists.setdefault(query, {}).update(dict.fromkeys(items))
            if not are_answers and len(lists[query]) < len(items):
                duplicate = Counter(items).most_common(1)[0][0]
                raise ValueError(f"{items_key} of {query_key} {query!r} has {duplicate!r} twice")
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    if direction is None:
        raise UserError(f"{path}: holds nothing")
    return Lists(direction, path, {query: list(items) for query, items in lists.items()})


def _infer_direction(content: dict[str, Any]) -> str:
    for direction, keys in KEYS.items():
        if all(key in content for key in keys):
            return direction
    forms = " nor ".join(f'"{query}" and "{items}"' for query, items in KEYS.values())
    raise ValueError(f"has neither {forms}")


def _get_items(content: dict[str, Any], key: str, may_be_missing: bool) -> list[Id]:
    items = content.get(key)
    if items is None and may_be_missing:
        return []
    if not isinstance(items, list) or not all(map(is_id, items)):
        raise ValueError(f'"{key}" is not a list of whole numbers or texts')
    return items


def swap_direction(answers: Lists) -> Lists:
    """The answers of the other direction: the queries of each item, in the order of the file."""
    swapped: dict[Id, list[Id]] = {}
    for query, items in answers.of.items():
        for item in items:
            swapped.setdefault(item, []).append(query)
    return Lists("i2t" if answers.direction == "t2i" else "t2i", answers.path, swapped)


def write_lists(path: Path, lists: Lists) -> None:
    """Write one record per query. Raises OSError if the path cannot be written."""
    lines = (json.dumps({lists.query_key: query, lists.items_key: items}) for query, items in lists.of.items())
    write_lines(path, lines)


def transform_to_tr(path: Path) -> Path:
    """Write the answers of a `X_texts.jsonl` by image to `X_texts.tr.jsonl`, and return the new path."""
    answers = read_lists(path, are_answers=True)
    if answers.direction != "t2i":
        raise UserError(f'{path}: already by image; give a file with "text_id" and "image_ids"')
    target = path.with_name(f"{path.name.removesuffix('.jsonl')}.tr.jsonl")
    write_lists(target, swap_direction(answers))
    return target


def score_predictions(gold: Path, predictions: Path, ks: Iterable[int] = STANDARD_K) -> dict[str, Any]:
    """Compute {"success": True, "score", "scoreJson": {"score", "mean_recall", "r1", "r5", "r10"}}, in percent.

    A query is a hit at K if any of its answers is among the first K predictions. Queries without an answer, and their
    predictions, are ignored. score and mean_recall are the mean of r1, r5 and r10, or of all ks if one of these is
    missing.

    Raises UserError if a file is invalid, or a query has no predictions or too few for a K.
    """
    # read both files, in the direction of the predictions
    ks = sorted(set(ks))
    if ks[0] < 1:
        raise UserError(f"recall at {ks[0]}: K must be at least 1")
    predicted = read_lists(predictions)
    answers = read_lists(gold, are_answers=True)
    if answers.direction != predicted.direction:
        answers = swap_direction(answers)
    answered = {query: items for query, items in answers.of.items() if items}
    if not answered:
        raise UserError(f"{gold}: no {answers.query_key} has an answer; give a file with answers")
    _check_coverage(answered, predicted, answers, ks[-1])
    # count the hits at each K
    hits = np.zeros(len(ks))
    for query, items in answered.items():
        relevant = set(items)
        rank = next((rank for rank, item in enumerate(predicted.of[query], 1) if item in relevant), np.inf)
        hits += rank <= np.array(ks)
    recalls = dict(zip(ks, (100 * hits / len(answered)).tolist()))
    mean = float(np.mean([recalls[k] for k in (STANDARD_K if {*STANDARD_K} <= {*ks} else ks)]))
    scores = {"score": mean, "mean_recall": mean, **{f"r{k}": recall for k, recall in recalls.items()}}
    return {"success": True, "score": mean, "scoreJson": scores}


def _check_coverage(answered: dict[Id, list[Id]], predicted: Lists, answers: Lists, k: int) -> None:
    """Raise UserError unless each query has k predictions, or predictions of all items that are answers."""
    relevant = {item for items in answered.values() for item in items}
    types = {type(item) for items in predicted.of.values() for item in items}
    if types and not types & set(map(type, relevant)):
        raise UserError(
            f"{predicted.path}: its {predicted.items_key} have another type than those of {answers.path}; both must "
            "be numbers, or both texts"
        )
    for query in answered:
        items = predicted.of.get(query)
        if items is None:
            raise UserError(
                f"{predicted.path}: has no predictions for {answers.query_key} {query!r} of {answers.path}; give files "
                "of one split"
            )
        if len(items) < k and not relevant <= set(items):
            raise UserError(
                f"{predicted.path}: {answers.query_key} {query!r} has {format_counts(prediction=len(items))}, too few "
                f"for recall at {k}; make them with --top_k {k}, or give smaller K as --recall_k"
            )


def write_scores(path: Path, score: Callable[[], dict[str, Any]]) -> None:
    """Write the result of `score` as one line of JSON; if it raises UserError, write the reason and raise again."""
    try:
        content = score()
    except UserError as error:
        reason = str(error)
        failure = {"success": False, "errorMsg": reason, "errorDetail": reason, "score": 0, "scoreJson": {}}
        write_lines(path, [json.dumps(failure)])
        raise
    write_lines(path, [json.dumps(content)])


def predict(
    image_feats: Path,
    text_feats: Path,
    outputs: dict[str, Path],
    *,
    top_k: int = 10,
    gallery_batch_size: int | None = None,
    index: str = "exact",
    device: str | None = None,
) -> None:
    """Write the top_k items of each query.

    Args:
        image_feats, text_feats: feature files, see `read_features`.
        outputs: {direction: file to write}, for "t2i", "i2t" or both.
        top_k: items per query; fewer if there are fewer.
        gallery_batch_size: maximum number of items to score at a time, to limit memory.
        index: "exact", or "faiss" (approximate, for galleries larger than memory).
        device: where to compute (default: the best available).

    Raises UserError for files that cannot be read or do not match.
    """
    if gallery_batch_size is not None and gallery_batch_size < 1:
        raise UserError(f"--eval_batch_size {gallery_batch_size}: must be at least 1")
    # read both files
    images = read_features(image_feats, "image", memory_map=index == "faiss")
    texts = read_features(text_feats, "text", memory_map=index == "faiss")
    if images.vectors.shape[1] != texts.vectors.shape[1]:
        raise UserError(
            f"{image_feats}: has {images.vectors.shape[1]} dimensions, but {text_feats} has {texts.vectors.shape[1]}; "
            "give features of one model"
        )
    # search and write each direction
    sides = {"t2i": (texts, images), "i2t": (images, texts)}
    if index == "faiss":
        from clip_retrieval.retrieval.faiss_index import approximate_nearest

        for direction, path in outputs.items():
            queries, items = sides[direction]
            _write_predictions(path, direction, queries, items, approximate_nearest(queries, items, top_k))
        return
    for direction, rows in _exact_nearest(images, texts, outputs, top_k, gallery_batch_size, device).items():
        _write_predictions(outputs[direction], direction, *sides[direction], rows)


def _exact_nearest(
    images: FeatureFile,
    texts: FeatureFile,
    directions: Iterable[str],
    top_k: int,
    gallery_batch_size: int | None,
    device: str | None,
) -> dict[str, np.ndarray]:
    from clip_retrieval.device import choose_device
    from clip_retrieval.evaluation.neighbours import nearest
    from clip_retrieval.evaluation.scores import Features, scoring_device, tile_size

    target = scoring_device(images.vectors, choose_device(device))
    # a tile is images x captions: limit the side that is the gallery of a direction
    rows, columns = tile_size(target)
    if gallery_batch_size is not None and "t2i" in directions:
        rows = min(rows, gallery_batch_size)
    if gallery_batch_size is not None and "i2t" in directions:
        columns = min(columns, gallery_batch_size)
    neighbours = nearest(
        Features(images.vectors, target, "image", images.name),
        Features(texts.vectors, target, "text", texts.name),
        top_k,
        directions=list(directions),
        tile=(rows, columns),
    )
    return {direction: found.items for direction, found in neighbours.items()}


def _write_predictions(path: Path, direction: str, queries: FeatureFile, items: FeatureFile, rows: np.ndarray) -> None:
    """Like `write_lists`, but each item id is converted to JSON only once."""
    query_key, items_key = KEYS[direction]
    texts: Sequence[str] = [json.dumps(item) for item in items.ids]
    write_lines(
        path,
        (
            f'{{"{query_key}": {json.dumps(query)}, "{items_key}": [{", ".join([texts[item] for item in row])}]}}'
            for query, row in zip(queries.ids, rows.tolist())
        ),
    )
