"""Model soups: the mean of the weights of several finetunes (Wortsman et al. 2022, arXiv:2203.05482).

python scripts/soup.py logs/a/best.pt logs/b/best.pt --output soup.pt
python scripts/soup.py logs/a/best.pt logs/b/best.pt --output soup.pt --greedy
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clip_retrieval.distributed import process_group
from clip_retrieval.errors import UserError
from clip_retrieval.log import log, start_log
from clip_retrieval.models.checkpoint import Checkpoint
from clip_retrieval.models.model_config import State
from clip_retrieval.models.weighted_mean import check_same_architecture, weighted_mean
from clip_retrieval.run.folder import make_folder
from clip_retrieval.run.weight_scores import WeightScorer, settle_checkpoint, with_weights


def make_soup(paths: Sequence[Path], output: Path, typed: dict[str, Any], *, greedy: bool = False) -> None:
    """Average checkpoints of ours into a new one.

    Args:
        paths: the checkpoints, finetuned from the same weights.
        output: the checkpoint to write.
        typed: options of the data and the evaluation, by name (with `greedy`).
        greedy: add a checkpoint only if the mean does not get worse on val, from the best checkpoint on.

    Raises UserError if the checkpoints have different architectures, or `output` exists.
    """
    start_log()
    if len(paths) < 2:
        raise UserError(f"{paths[0]}: a soup needs at least two checkpoints; give more")
    if output.exists():
        raise UserError(f"--output {output} already exists; choose another name, or delete it")
    make_folder(output.absolute().parent, "--output")
    if greedy:
        return _make_greedy_soup(paths, output, typed)
    first = Checkpoint.load(paths[0])
    total = first.model
    for path in paths[1:]:
        total = _add(total, _load(path, first))
    with_weights(first, _mean(total, len(paths), first), None).save(output)
    log.info(f"wrote {output}, the mean of {len(paths)} checkpoints")


def _make_greedy_soup(paths: Sequence[Path], output: Path, typed: dict[str, Any]) -> None:
    options, first = settle_checkpoint(paths[0], typed)
    with process_group(options.run.device) as processes:
        # order by val: the first one, from memory, then the others, one at a time
        scorer = WeightScorer.prepare(options, first, processes)
        scorer.splits.pop("test", None)
        blocks = {}
        for path in paths:
            scorer.model.load_weights(_load(path, first))
            blocks[path] = scorer.score("val")
            log.info(f"{path}: val rsum {blocks[path]['rsum']:.2f}")
        order = sorted(blocks, key=lambda path: blocks[path]["rsum"], reverse=True)

        # add each that does not make it worse, as in the paper
        total, used, block = _load(order[0], first), order[:1], blocks[order[0]]
        for path in order[1:]:
            tried = _add(total, _load(path, first))
            scorer.model.load_weights(_mean(tried, len(used) + 1, first))
            found = scorer.score("val")
            is_kept = found["rsum"] >= block["rsum"]
            log.info(f"with {path}: val rsum {found['rsum']:.2f}, {'added' if is_kept else 'left out'}")
            if is_kept:
                total, used, block = tried, [*used, path], found
        if processes.is_main:
            with_weights(first, _mean(total, len(used), first), block).save(output)
    log.info(f"wrote {output}, the mean of {len(used)} of {len(blocks)} checkpoints, val rsum {block['rsum']:.2f}")


def _load(path: Path, first: Checkpoint) -> State:
    """Load the weights of a checkpoint of the same architecture as `first`."""
    checkpoint = Checkpoint.load(path)
    check_same_architecture(first.model, checkpoint.model, (str(first.path), str(path)))
    return checkpoint.model


def _add(total: State, state: State) -> State:
    """Add weights to a sum, in float64."""
    return weighted_mean([state, total], [1.0, 1.0], torch.float64)


def _mean(total: State, count: int, first: Checkpoint) -> State:
    """Divide a sum of weights; the dtypes are those of the checkpoint `first`."""
    mean = weighted_mean([total], [1 / count])
    return {name: value.to(first.model[name].dtype) for name, value in mean.items()}
