"""WiSE-FT: interpolate between the starting and the finetuned weights (Wortsman et al. 2022, arXiv:2109.01903).

python scripts/interpolate.py openai logs/ex0/best.pt
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_retrieval.distributed import process_group
from clip_retrieval.errors import UserError
from clip_retrieval.log import log, log_to_file, start_log
from clip_retrieval.models.build import build_model
from clip_retrieval.models.checkpoint import ADAPTOR, Checkpoint
from clip_retrieval.models.model_config import State
from clip_retrieval.models.weighted_mean import check_same_architecture, weighted_mean
from clip_retrieval.options import Options
from clip_retrieval.reporting.figures import draw_interpolation
from clip_retrieval.reporting.results import write_results
from clip_retrieval.reporting.table import RECALL_HEADS, align, recall_cells
from clip_retrieval.run.folder import make_folder
from clip_retrieval.run.model import warn_of_random_weights
from clip_retrieval.run.weight_scores import WeightScorer, selection_score, settle_checkpoint, with_weights

CHOSEN, CURVE = "interpolated.pt", "interpolation.png"


def interpolate(
    start: str, finetuned: Path, alphas: Sequence[float], typed: dict[str, Any], output: Path | None = None
) -> None:
    """Score (1 - alpha) * start + alpha * finetuned for each alpha, and keep the best on val.

    Args:
        start: the starting weights: anything that --pretrained accepts.
        finetuned: a checkpoint of ours.
        alphas: from 0, the starting weights, to 1, the finetuned ones.
        typed: options of the data and the evaluation, by name.
        output: folder of results.json, the curve and the chosen checkpoint (default: beside the finetuned one).
    """
    if bad := [alpha for alpha in alphas if not 0 <= alpha <= 1]:
        raise UserError(f"--alphas {bad[0]:g}: must be from 0 (the start) to 1 (finetuned)")
    start_log()
    options, checkpoint = settle_checkpoint(finetuned, typed)
    with process_group(options.run.device) as processes:
        # load both weights, and the data
        scorer = WeightScorer.prepare(options, checkpoint, processes, retention=True)
        with processes.main_first():  # it may download
            first = load_start(start, options, checkpoint)
        check_same_architecture(first, checkpoint.model, (start, str(finetuned)))
        folder = output or finetuned.parent / f"interpolate_{options.data.name}"
        if processes.is_main:
            make_folder(folder, "--output")
            log_to_file(folder)

        # score each alpha
        rows: list[dict[str, Any]] = []
        for alpha in sorted(set(alphas)):
            rows.append({"alpha": alpha, **scorer.score_all(mix(first, checkpoint.model, alpha))})
            log.info(f"alpha {alpha:g}  val rsum {rows[-1]['val']['rsum']:.2f}")
        weight = options.evaluation.retention_weight
        best = max(rows, key=lambda row: selection_score(row, weight))

        # write the chosen checkpoint, results.json and the curve
        if processes.is_main:
            state = mix(first, checkpoint.model, best["alpha"])
            with_weights(checkpoint, state, best["val"]).save(folder / CHOSEN)
            sources = {"alpha": best["alpha"], "start": start, "finetuned": str(finetuned)}
            blocks = {name: best[name] for name in ("val", "zero_shot", "retention") if name in best}
            write_results(folder, best.get("test", best["val"]) | sources | blocks | {"curve": rows})
            curves = {name: [row[name]["rsum"] for row in rows] for name in scorer.splits}
            accuracy = [row["zero_shot"]["top1"] for row in rows] if scorer.zero_shot else None
            draw_interpolation(folder / CURVE, [row["alpha"] for row in rows], curves, accuracy, best["alpha"])
    log.info(f"recall on {'test' if 'test' in best else 'val'}, in percent:\n{alpha_table(rows, best)}")
    retained = f" + {weight:g} x {'retention rsum' if 'retention' in best else 'top-1'}" if weight else ""
    log.info(f"chosen on val{retained}: alpha {best['alpha']:g}; wrote {folder / CHOSEN}, results.json and {CURVE}")


def load_start(start: str, options: Options, checkpoint: Checkpoint) -> State:
    """Load the starting weights, at the image size and context length of the finetuned model."""
    model = replace(options.model, pretrained=start, text_pretrained=None)
    built = build_model(model, logit_bias="logit_bias" in checkpoint.model)
    warn_of_random_weights(built)
    adaptor = {f"{ADAPTOR}{name}": value for name, value in (built.adaptor_state or {}).items()}
    return built.clip.state_dict() | adaptor


def mix(first: State, last: State, alpha: float) -> State:
    """Return (1 - alpha) * first + alpha * last."""
    return weighted_mean([first, last], [1 - alpha, alpha])


def alpha_table(rows: list[dict[str, Any]], best: dict[str, Any]) -> str:
    """A line for each alpha: recall on test (else val), rsum on val, and retention scores; a star marks the best."""
    further = {"retention": ("retention rsum", "rsum"), "zero_shot": ("top-1", "top1")}
    further = {name: head_and_key for name, head_and_key in further.items() if name in best}
    shown = [["alpha", *RECALL_HEADS, "rsum", "val rsum", *(head for head, _ in further.values())]]
    for row in rows:
        block = row.get("test", row["val"])
        cells = [f"{row['alpha']:g}{' *' if row is best else ''}", *recall_cells(block)]
        cells += [f"{block['rsum']:.2f}", f"{row['val']['rsum']:.2f}"]
        shown.append(cells + [f"{row[name][key]:.2f}" for name, (_, key) in further.items()])
    return align(shown)
