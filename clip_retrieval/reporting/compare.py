"""Two evaluations of the same split: the difference of each figure, how sure it is, and the queries won and lost."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clip_retrieval.errors import UserError, format_counts, one_line
from clip_retrieval.evaluation.bootstrap import bootstrap_report, interval
from clip_retrieval.evaluation.metrics import STANDARD_K, expected_ranks, hit_chances, report
from clip_retrieval.evaluation.ranks import Ranks
from clip_retrieval.log import log
from clip_retrieval.reporting.ranks_file import RankedQueries, read_ranks
from clip_retrieval.reporting.results import RANKS


def compare(a: Path, b: Path, queries: int = 0) -> dict[str, Any]:
    """Compare two evaluations on the queries that both have.

    Args:
        a, b: folders of evaluations or finetunes, their results.json or their ranks.npz.
        queries: number of queries to list in each direction, those whose rank changed by the largest factor.

    Returns {"a": metrics, "b": metrics, "queries": {"i2t", "t2i"}, "difference": {"i2t": {"R@1": {"value", "interval",
    "p"}}, ...}, "won" and "lost": {"i2t": {"R@1": count}}, "changed": {"i2t": [{"id", "a", "b"}]}}, differences b - a.
    "interval" is the 95% interval of the paired bootstrap, and "p" twice the share of its samples in which the
    difference is not on its side of 0.

    Raises UserError if a file cannot be read, or the evaluations have no common query.
    """
    # match the queries
    files = [_find_ranks(a), _find_ranks(b)]
    common, other = _match(read_ranks(files[0]), read_ranks(files[1]), files)
    sides = [common.ranks, other]

    # the paired bootstrap: both draw the same images
    values = [report(ranks["i2t"], ranks["t2i"]) for ranks in sides]
    drawn = [bootstrap_report(ranks["i2t"], ranks["t2i"], common.first_image) for ranks in sides]
    difference: dict[str, Any] = {}
    for name, value in values[0].items():
        if isinstance(value, dict):
            difference[name] = {
                metric: _differ(*(block[name][metric] for block in (*values, *drawn))) for metric in value
            }
        else:
            difference[name] = _differ(*(block[name] for block in (*values, *drawn)))

    # single queries
    result: dict[str, Any] = {"a": values[0], "b": values[1], "difference": difference}
    result |= {"queries": {}, "won": {}, "lost": {}, "changed": {}}
    for direction, ids in common.ids.items():
        result["queries"][direction] = len(ids)
        chances = {f"R@{k}": [hit_chances(ranks[direction], k) for ranks in sides] for k in STANDARD_K}
        for name, sign in (("won", 1), ("lost", -1)):
            result[name][direction] = {k: int((sign * (y - x) > 0).sum()) for k, (x, y) in chances.items()}
        before, after = (expected_ranks(ranks[direction]) for ranks in sides)
        order = np.argsort(-np.abs(np.log(after / before)), kind="stable")[:queries]
        result["changed"][direction] = [
            {"id": str(ids[row]), "a": float(before[row]), "b": float(after[row])} for row in order
        ]
    return result


def comparison_table(comparison: dict[str, Any]) -> str:
    """Format the result of `compare`; at most 80 columns unless ids are longer."""
    lines = [f"{'':12}{'A':>8}{'B':>9}{'B - A':>9}   {'95% interval':^20}{'p':>6}{'won':>6}{'lost':>6}"]
    lines.append("-" * len(lines[0]))
    for name, block in comparison["difference"].items():
        for metric, found in block.items() if isinstance(comparison["a"][name], dict) else [("", block)]:
            a, b = (comparison[side][name][metric] if metric else comparison[side][name] for side in ("a", "b"))
            low, high = found["interval"]
            won, lost = (comparison[sign].get(name, {}).get(metric, "") for sign in ("won", "lost"))
            label = f"{name} {metric}".strip().replace("mean_recall", "mean")
            span = f"[{low:+.2f}, {high:+.2f}]"
            numbers = f"{a:8.2f}{b:9.2f}{found['value']:+9.2f}   {span:^20}{found['p']:6.3f}"
            lines.append(f"{label:12}{numbers}{won:>6}{lost:>6}")
    for direction, changed in comparison["changed"].items():
        if changed:
            lines += ["", f"{direction}: the largest changes of rank", f"{'rank A':>10}{'rank B':>10}  id"]
            lines += [f"{row['a']:10g}{row['b']:10g}  {one_line(row['id'])}" for row in changed]
    return "\n".join(lines)


def _differ(a: float, b: float, drawn_a: np.ndarray, drawn_b: np.ndarray) -> dict[str, Any]:
    # rounded: equal sums may differ in the last bits, but belong to both sides of 0
    samples = np.round((drawn_b - drawn_a)[np.isfinite(drawn_a)], 9) + 0.0
    share = min((samples <= 0).mean(), (samples >= 0).mean())
    return {"value": b - a, "interval": interval(samples), "p": min(1.0, 2 * float(share))}


def _find_ranks(place: Path) -> Path:
    """The ranks.npz of a folder, or beside a results.json."""
    if place.is_dir() or place.suffix == ".json":
        path = (place if place.is_dir() else place.parent) / RANKS
        if not path.exists():
            raise UserError(f"{path}: no such file; evaluate the model again with this version, which writes it")
        return path
    return place


def _match(a: RankedQueries, b: RankedQueries, files: list[Path]) -> tuple[RankedQueries, dict[str, Ranks]]:
    """The queries of a that b has too, and the ranks of b for them. Raises UserError if there are none."""
    # match images by their names below the folder of all, captions by their ids and images
    names = [_shorten(each.ids["i2t"]) for each in (a, b)]
    captions = [_caption_keys(each, own) for each, own in zip((a, b), names)]
    is_row = any(map(_has_row_numbers, (a, b)))
    if not set(names[0]) & set(names[1]) or (is_row and names[0] != names[1]):
        names, captions = _match_texts(a, b, names, files)
    rows = {"i2t": _find_common(names, "image", files)}
    rows["t2i"] = _find_common(captions, "caption", files)
    # number the queries as a does
    common = RankedQueries(
        {name: a.ids[name][row[0]] for name, row in rows.items()},
        {name: a.ranks[name][row[0]] for name, row in rows.items()},
        a.first_image[rows["t2i"][0]],
    )
    others = {name: replace(b.ranks[name][row[1]], queries=common.ranks[name].queries) for name, row in rows.items()}
    return common, others


def _match_texts(
    a: RankedQueries, b: RankedQueries, names: list[list[str]], files: list[Path]
) -> tuple[list[list[str]], list[list[Any]]]:
    """Keys of the images and captions by the texts of the captions, for data that two readers name differently.

    A caption that only one image has in both evaluations matches its image. Raises UserError if there is none, or an
    image matches two.
    """
    sides = [(each, each.texts) for each in (a, b) if each.texts is not None]
    if len(sides) < 2:
        raise UserError(
            f"{files[0]} and {files[1]} have different images, or captions without ids, and one lacks the texts to "
            "match them by; evaluate both again with this version"
        )
    # the images of the texts that occur once in each
    places = []
    for each, hashes in sides:
        texts, first, count = np.unique(hashes, return_index=True, return_counts=True)
        places.append(dict(zip(texts[count == 1].tolist(), each.first_image[first[count == 1]].tolist())))
    matched = {(places[0][text], places[1][text]) for text in places[0].keys() & places[1].keys()}
    if not matched:
        raise UserError(
            f"{files[0]} and {files[1]} have no image or caption in common; give two evaluations of one split"
        )
    if any(len(set(side)) < len(matched) for side in zip(*matched)):
        raise UserError(
            f"{files[0]} and {files[1]} have different image names, and their captions match several images; give two "
            "evaluations that name the images alike"
        )
    log.info("the image names or caption ids differ: matched by the texts of the captions")
    # name the images of b as a does; captions by image, text and repetition
    own = dict(zip(a.ranks["i2t"].queries.tolist(), names[0]))
    other = {image_b: own.get(image_a, "") for image_a, image_b in matched}
    keys: list[list[str]] = []
    captions: list[list[Any]] = []
    for (each, hashes), name_of in zip(sides, (own, other)):
        keys.append([name_of.get(image) or f"{image} only" for image in each.ranks["i2t"].queries.tolist()])
        seen: Counter[tuple[str, int]] = Counter()
        captions.append([])
        for image, text in zip(each.first_image.tolist(), hashes.tolist()):
            key = (name_of.get(image) or f"{image} only", text)
            captions[-1].append((*key, seen[key]))
            seen[key] += 1
    return keys, captions


def _find_common(keys: list[list[Any]], kind: str, files: list[Path]) -> np.ndarray:
    """The rows of the common keys in both lists, int64 (2, n)."""
    for key, file in zip(keys, files):
        if len(set(key)) < len(key):
            raise UserError(f"{file}: two {kind}s have the same id; give evaluations of data with unique ids")
    left, right = keys
    row_of = {key: row for row, key in enumerate(right)}
    common = [(row, row_of[key]) for row, key in enumerate(left) if key in row_of]
    if not common:
        raise UserError(f"{files[0]} and {files[1]} have no {kind} in common; give two evaluations of one split")
    if len(common) < max(len(left), len(right)):
        counts = " and ".join(format_counts(**{kind: len(key)}) for key in keys)
        log.warning(f"of {counts}, only the {len(common):,} that both evaluations have are compared")
    return np.array(common).T


def _shorten(ids: np.ndarray) -> list[str]:
    """Image names without the folder of all of them: the data may be in another place."""
    names = ids.tolist()
    if len(names) > 1 and all(os.path.isabs(name) for name in names):  # noqa: PTH117  a Path for each takes long
        folder = os.path.commonpath([min(names), max(names)])
        return [name[len(folder) :].lstrip("/\\") for name in names]
    return names


def _caption_keys(queries: RankedQueries, names: list[str]) -> list[tuple[str, str]]:
    rows = np.searchsorted(queries.ranks["i2t"].queries, queries.first_image).clip(max=len(names) - 1)
    return [(caption, names[row]) for caption, row in zip(queries.ids["t2i"].tolist(), rows.tolist())]


def _has_row_numbers(queries: RankedQueries) -> bool:
    return queries.ids["t2i"].tolist() == list(map(str, queries.ranks["t2i"].queries.tolist()))
