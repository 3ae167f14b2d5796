"""Retrieval by language: the images are encoded once for the captions of all languages.

python scripts/multilingual.py --data xm3600/captions.jsonl --image_dir xm3600/images --resume logs/ex0/best.pt
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from clip_retrieval.data.multilingual import MultilingualData, read_multilingual
from clip_retrieval.errors import one_line
from clip_retrieval.evaluation.metrics import report
from clip_retrieval.evaluation.ranks import retrieval_ranks
from clip_retrieval.log import log
from clip_retrieval.reporting.table import RECALL_HEADS, align, recall_cells
from clip_retrieval.run.ensemble import Ensemble
from clip_retrieval.run.tool import run_tool


def score_languages(
    typed: dict[str, Any],
    data: Path,
    image_dir: Path,
    languages: Collection[str] = (),
    first_caption: bool = False,
    output: Path | None = None,
) -> None:
    """Score the model of the options for each language, and write results.json.

    Args:
        typed: options of the command line about the model and its evaluation.
        data, image_dir, languages, first_caption: see `data.multilingual.read_multilingual`.
        output: folder of the results.
    """

    def read() -> MultilingualData:
        found = read_multilingual(data, image_dir, languages, first_caption=first_caption)
        log.info(f"{found.dataset.name}: {len(found.languages)} languages")
        return found

    run_tool(typed, read, _score, output)


def _score(ensemble: Ensemble, data: MultilingualData) -> tuple[dict[str, Any], str]:
    """The content of results.json, and the table."""
    encoded = ensemble.encode(data.dataset)
    blocks = {}
    for language, (own, pairs) in data.languages.items():
        ranks = retrieval_ranks(encoded.images, encoded.captions[own], pairs, processes=ensemble.processes)
        blocks[language] = {"captions": own.stop - own.start, **report(*ranks)}
    mean: dict[str, Any] = {
        direction: {
            name: float(np.mean([block[direction][name] for block in blocks.values()]))
            for name in next(iter(blocks.values()))[direction]
        }
        for direction in ("i2t", "t2i")
    }
    mean |= {name: float(np.mean([block[name] for block in blocks.values()])) for name in ("mean_recall", "rsum")}
    results = {"dataset": data.dataset.name, "images": len(data.dataset.images), "languages": blocks, "mean": mean}
    return results, _table(blocks | {"mean": mean})


def _table(blocks: dict[str, Any]) -> str:
    """A line for each language, and their mean; recall in percent."""
    rows = [["language", "captions", *RECALL_HEADS, "mean"]]
    for language, block in blocks.items():
        number = f"{block['captions']:,}" if "captions" in block else ""
        rows.append([one_line(language), number, *recall_cells(block), f"{block['mean_recall']:.2f}"])
    return align(rows)
