"""The top items of every query of an evaluation, with scores, for other systems: --save_rankings.

    test_predictions.jsonl       {"text_id": 770337, "image_ids": [391895, ...], "scores": [...], "text": "a man ..."}
    test_tr_predictions.jsonl    {"image_id": 391895, "text_ids": [770337, ...], "scores": [...], "texts": [...]}
    test_t2i.run, test_i2t.run   770337 Q0 391895 1 0.3125 clip_retrieval
    test_t2i.qrels, ...          770337 0 391895 1

The first two are Chinese-CLIP's predictions with further keys, the others TREC's run and qrels for trec_eval. Ids are
those of the data set. If it has none, they are the names of the images and the rows of the captions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from clip_retrieval.data.dataset import KeyedImages, RetrievalDataset
from clip_retrieval.distributed import SINGLE_PROCESS, Processes
from clip_retrieval.evaluation.neighbours import nearest
from clip_retrieval.evaluation.scores import Features, exact_scores, scoring_device
from clip_retrieval.files import to_json
from clip_retrieval.jsonl import Id, write_lines
from clip_retrieval.log import log
from clip_retrieval.retrieval.predictions import KEYS

NAMES = {"t2i": "predictions", "i2t": "tr_predictions"}


def save_rankings(
    folder: Path,
    images: Tensor,
    captions: Tensor,
    dataset: RetrievalDataset,
    k: int,
    processes: Processes = SINGLE_PROCESS,
) -> None:
    """Write the exact top k items of every query, from features (images, dim) and (captions, dim). Raises OSError."""
    device = scoring_device(images, None)
    sides = [Features(images, device, "image", str), Features(captions, device, "caption", str)]
    found = nearest(sides[0], sides[1], k, processes=processes)
    if not processes.is_main:
        return
    name = dataset.images.key if isinstance(dataset.images, KeyedImages) else dataset.images.name
    ids: list[Sequence[Id]] = [dataset.image_ids or [name(row) for row in range(len(images))]]
    ids.append(dataset.text_ids or range(len(captions)))
    for direction, query in (("t2i", 1), ("i2t", 0)):
        # the float64 scores of the items
        rows = found[direction].items
        queries, item_ids = ids[query], ids[1 - query]
        pairs = np.broadcast_arrays(np.arange(len(rows))[:, None], rows)
        index = [torch.from_numpy(part.ravel()).to(device) for part in pairs]
        exact = exact_scores(sides[query], index[0], sides[1 - query], index[1]) / (sides[0].scale * sides[1].scale)
        scores = exact.reshape(rows.shape).tolist()

        # Chinese-CLIP's predictions
        query_key, items_key = KEYS[direction]
        lines = []
        for row, items in enumerate(rows.tolist()):
            line = {query_key: queries[row], items_key: [item_ids[item] for item in items], "scores": scores[row]}
            texts = dataset.captions
            line |= {"text": texts[row]} if direction == "t2i" else {"texts": [texts[item] for item in items]}
            lines.append(to_json(line).decode())
        write_lines(folder / f"{dataset.split}_{NAMES[direction]}.jsonl", lines)

        # TREC's run and qrels
        words, item_words = list(map(_word, queries)), list(map(_word, item_ids))
        run = (
            f"{words[row]} Q0 {item_words[item]} {place} {score!r} clip_retrieval"
            for row, items in enumerate(rows.tolist())
            for place, (item, score) in enumerate(zip(items, scores[row]), 1)
        )
        write_lines(folder / f"{dataset.split}_{direction}.run", run)
        pairs = dataset.pairs[:, [query, 1 - query]].tolist()
        qrels = (f"{words[row]} 0 {item_words[item]} 1" for row, item in pairs)
        write_lines(folder / f"{dataset.split}_{direction}.qrels", qrels)
    log.info(f"wrote the first {k} items of each query to {folder / dataset.split}_*.jsonl, *.run and *.qrels")


def _word(name: Id) -> str:
    """The id as one word, with percent escapes: TREC's fields are separated by spaces."""
    return re.sub(r"[\s%]", lambda match: quote(match[0]), str(name)).encode(errors="backslashreplace").decode()
