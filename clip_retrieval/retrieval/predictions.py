"""Predictions on disk, in Chinese-CLIP's format: what each query retrieves, and what that is worth.

    test_predictions.jsonl       {"text_id": 153915, "image_ids": [5791244, 1009692167, ...]}     text to image
    test_tr_predictions.jsonl    {"image_id": 977856234, "text_ids": [156914, 157914, ...]}       image to text

The answers (the gold file) have the same two forms: `_texts.jsonl`, which may hold further keys, and `.tr.jsonl`.
Either serves predictions of either direction.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_retrieval.errors import UserError
from clip_retrieval.jsonl import Id, get_id, is_id, read_records, write_lines
from clip_retrieval.retrieval.features import FeatureFile, read_features

STANDARD_K = (1, 5, 10)  # as in evaluation.metrics, which would load torch
KEYS = {"t2i": ("text_id", "image_ids"), "i2t": ("image_id", "text_ids")}


@dataclass(frozen=True)
class Lists:
    """A list of item ids for each query id: the answers of queries, or what was predicted for them.

    Attributes:
        direction: "t2i", where queries are texts and items images, or "i2t".
        path: the file they are from.
        of: the lists by query id.
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
    """Read predictions or answers, of the direction that the keys of the first line tell.

    A query with answers on several lines has all of them. Raises UserError, naming file and line, where a line is
    something else, or an id stands twice in predictions.
    """
    direction = None
    lists: dict[Id, dict[Id, None]] = {}  # dicts serve as sets that keep the order
    for number, content in read_records(path):
        try:
            direction = direction or _direction(content)
            query_key, items_key = KEYS[direction]
            query, items = get_id(content, query_key), _items(content, items_key, are_answers)
            if not are_answers and query in lists:
                raise ValueError(f"{query_key} {query!r} has predictions already")
            lists.setdefault(query, {}).update(dict.fromkeys(items))
            if not are_answers and len(lists[query]) < len(items):
                twice = Counter(items).most_common(1)[0][0]
                raise ValueError(f"{items_key} of {query_key} {query!r} has {twice!r} twice")
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    if direction is None:
        raise UserError(f"{path}: holds nothing")
    return Lists(direction, path, {query: list(items) for query, items in lists.items()})


def _direction(content: dict[str, Any]) -> str:
    for direction, keys in KEYS.items():
        if all(key in content for key in keys):
            return direction
    forms = " nor ".join(f'"{query}" and "{items}"' for query, items in KEYS.values())
    raise ValueError(f"has neither {forms}")


def _items(content: dict[str, Any], key: str, may_be_missing: bool) -> list[Id]:
    items = content.get(key)
    if items is None and may_be_missing:
        return []
    if not isinstance(items, list) or not all(map(is_id, items)):
        raise ValueError(f'"{key}" is not a list of whole numbers or texts')
    return items


def swap_direction(answers: Lists) -> Lists:
    """The same relevance the other way: the queries that each item answers, in the order of the file."""
    other: dict[Id, list[Id]] = {}
    for query, items in answers.of.items():
        for item in items:
            other.setdefault(item, []).append(query)
    return Lists("i2t" if answers.direction == "t2i" else "t2i", answers.path, other)


def write_lists(path: Path, lists: Lists) -> None:
    """Write a record for each query. Raises UserError where the place cannot be written."""
    lines = (json.dumps({lists.query_key: query, lists.items_key: items}) for query, items in lists.of.items())
    write_lines(path, lines)


def transform_to_tr(path: Path) -> Path:
    """Write the answers of a `X_texts.jsonl` by image, to `X_texts.tr.jsonl`, and return its path."""
    answers = read_lists(path, are_answers=True)
    if answers.direction != "t2i":
        raise UserError(f'{path}: is by image already; give a file with "text_id" and "image_ids"')
    target = path.with_name(f"{path.name.removesuffix('.jsonl')}.tr.jsonl")
    write_lists(target, swap_direction(answers))
    return target


def score_predictions(gold: Path, predictions: Path, ks: Iterable[int] = STANDARD_K) -> dict[str, Any]:
    """{"success": True, "score", "scoreJson": {"score", "mean_recall", "r1", "r5", "r10"}}, percent.

    A query is a hit at K when any of its answers is among the first K predicted; queries without an answer do not
    count, predictions for them are not looked at. score and mean_recall are the mean of r1, r5 and r10, or of the ks
    where these are not all among them.

    Raises UserError where a file is not as it should be, a query has no prediction, or too few of them for a K.
    """
    ks = sorted(set(ks))
    if ks[0] < 1:
        raise UserError(f"recall at {ks[0]} has no meaning: K starts at 1")
    predicted = read_lists(predictions)
    answers = read_lists(gold, are_answers=True)
    if answers.direction != predicted.direction:
        answers = swap_direction(answers)
    asked = {query: items for query, items in answers.of.items() if items}
    if not asked:
        raise UserError(f"{gold}: no {answers.query_key} has an answer; there is nothing to score")
    _check_coverage(asked, predicted, answers, ks[-1])
    hits = np.zeros(len(ks))
    for query, items in asked.items():
        wanted = set(items)
        place = next((place for place, item in enumerate(predicted.of[query], 1) if item in wanted), np.inf)
        hits += place <= np.array(ks)
    recalls = dict(zip(ks, (100 * hits / len(asked)).tolist()))
    mean = float(np.mean([recalls[k] for k in (STANDARD_K if {*STANDARD_K} <= {*ks} else ks)]))
    scores = {"score": mean, "mean_recall": mean, **{f"r{k}": recall for k, recall in recalls.items()}}
    return {"success": True, "score": mean, "scoreJson": scores}


def _check_coverage(asked: dict[Id, list[Id]], predicted: Lists, answers: Lists, k: int) -> None:
    """Each query has k predictions, or, where there are fewer items than that to find, all of them."""
    every = {item for items in asked.values() for item in items}
    types = {type(item) for items in predicted.of.values() for item in items}
    if types and not types & set(map(type, every)):
        raise UserError(
            f"{predicted.path}: the {predicted.items_key} are of another type than those of {answers.path} (numbers "
            "here, texts there)"
        )
    for query in asked:
        items = predicted.of.get(query)
        if items is None:
            raise UserError(
                f"{predicted.path}: has no predictions for {answers.query_key} {query!r} of {answers.path}; both must "
                "be of one split"
            )
        if len(items) < k and not every <= set(items):
            raise UserError(
                f"{predicted.path}: {answers.query_key} {query!r} has {len(items)} predictions, too few for recall at "
                f"{k}; make them with --top_k {k}, or ask for less with --recall_k"
            )


def write_scores(path: Path, score: Callable[[], dict[str, Any]]) -> None:
    """Write what `score` gives as one line of JSON; what went wrong instead, before it is raised again."""
    try:
        content = score()
    except UserError as error:
        reason = str(error)
        failed = {"success": False, "errorMsg": reason, "errorDetail": reason, "score": 0, "scoreJson": {}}
        write_lines(path, [json.dumps(failed)])
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
    """Write the first top_k items of each query, of the directions ("t2i", "i2t") that `outputs` names a file for.

    gallery_batch_size: items that are scored at a time at most, for memory only. index: "exact", or "faiss"
    (approximate, for galleries that do not fit into the memory). device: where to compute (default: the best there is).

    Raises UserError for files that cannot be read or do not go together.
    """
    if gallery_batch_size is not None and gallery_batch_size < 1:
        raise UserError(f"--eval_batch_size {gallery_batch_size}: must be at least 1")
    images = read_features(image_feats, "image", memory_map=index == "faiss")
    texts = read_features(text_feats, "text", memory_map=index == "faiss")
    if images.vectors.shape[1] != texts.vectors.shape[1]:
        raise UserError(
            f"{image_feats} has {images.vectors.shape[1]} dimensions and {text_feats} has {texts.vectors.shape[1]}: "
            "both must come from one model"
        )
    sides = {"t2i": (texts, images), "i2t": (images, texts)}
    if index == "faiss":
        from clip_retrieval.retrieval.faiss_index import approximate_nearest

        for direction, path in outputs.items():
            queries, items = sides[direction]
            _write_predictions(path, direction, queries, items, approximate_nearest(queries, items, top_k))
        return
    for direction, rows in _exact(images, texts, outputs, top_k, gallery_batch_size, device).items():
        _write_predictions(outputs[direction], direction, *sides[direction], rows)


def _exact(
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

    place = scoring_device(images.vectors, choose_device(device))
    tile = list(tile_size(place))
    if gallery_batch_size is not None:
        for side, direction in enumerate(("t2i", "i2t")):
            if direction in directions:
                tile[side] = min(tile[side], gallery_batch_size)
    found = nearest(
        Features(images.vectors, place, "image", images.name),
        Features(texts.vectors, place, "text", texts.name),
        top_k,
        directions=list(directions),
        tile=tuple(tile),
    )
    return {direction: neighbours.items for direction, neighbours in found.items()}


def _write_predictions(path: Path, direction: str, queries: FeatureFile, items: FeatureFile, rows: np.ndarray) -> None:
    """As `write_lists` does; an id of an item becomes text once only."""
    query_key, items_key = KEYS[direction]
    texts: Sequence[str] = [json.dumps(item) for item in items.ids]
    write_lines(
        path,
        (
            f'{{"{query_key}": {json.dumps(query)}, "{items_key}": [{", ".join([texts[item] for item in row])}]}}'
            for query, row in zip(queries.ids, rows.tolist())
        ),
    )
