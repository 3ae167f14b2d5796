"""The evaluation run: a model, a split, exact recalls, results.json.

python main.py --eval --resume logs/ex0/best.pt
python main.py --eval --vision_model ViT-L/14 --dataset_root DATA
"""

from __future__ import annotations

from typing import Any

from clip_retrieval.data.dataset import UNSPLIT
from clip_retrieval.device import device_name
from clip_retrieval.distributed import Processes, process_group
from clip_retrieval.errors import UserError
from clip_retrieval.log import log, log_to_file, start_log
from clip_retrieval.models.checkpoint import Checkpoint
from clip_retrieval.options import AUTO, Options
from clip_retrieval.reporting.html.write import Evaluated, name_run, write_report
from clip_retrieval.reporting.ranks_file import write_ranks
from clip_retrieval.reporting.results import RANKS, REPORT, delete_derived, write_options, write_results
from clip_retrieval.reporting.table import protocols_table, rerank_table, results_table
from clip_retrieval.retrieval.rankings import save_rankings
from clip_retrieval.run.evaluation import Evaluation
from clip_retrieval.run.folder import make_folder, results_folder, run_folder
from clip_retrieval.run.model import record_model_name
from clip_retrieval.run.settings import settle_options
from clip_retrieval.run.splits import log_samples


def evaluate(typed: dict[str, Any], config: dict[str, Any] | None = None) -> None:
    """Score a model on a split, and write results.json.

    Args:
        typed: the options of the command line, by name.
        config: those of --config, if it has been read already.
    """
    start_log()
    options, checkpoint = settle_options(typed, config)
    if "zero_shot_eval" in typed:
        raise UserError("--zero_shot_eval is for training; scripts/zero_shot.py classifies with a model as it is")
    with process_group(options.run.device) as processes:
        evaluate_with(options, checkpoint, typed, processes)


def evaluate_with(options: Options, checkpoint: Checkpoint | None, typed: dict[str, Any], processes: Processes) -> None:
    """The evaluation of one or of several processes, which share the work."""
    # read the data, then load the models
    evaluation = Evaluation.prepare(options, checkpoint, processes)
    dataset, built = evaluation.dataset, evaluation.ensemble.members[0].built
    options = record_model_name(options, built)
    log_samples(dataset)

    # make the output folder
    split = UNSPLIT if dataset.split == UNSPLIT else options.evaluation.eval_split
    name = f"{options.data.name}_{split}{'_ensemble' * bool(options.evaluation.ensemble)}"
    folder = results_folder(options.run, "eval", name, model=built.name, beside=checkpoint.path if checkpoint else None)
    if "experiments" in typed and typed.get("resume") != AUTO:
        folder = run_folder(options.run)
        if (folder / "metrics.jsonl").exists():
            raise UserError(
                f"{folder} holds a training run; choose another --experiments for the evaluation, or drop it"
            )
    if processes.is_main:
        make_folder(folder)
        log_to_file(folder)

    # encode and score
    scores = evaluation.score()

    # write the results
    results = scores.results
    if processes.is_main:
        device = evaluation.ensemble.device
        write_options(folder, options, f"{device} ({device_name(device)})")
        delete_derived(folder)
        write_results(folder, results)
        write_ranks(folder / RANKS, dataset, *scores.ranks)
    if k := options.evaluation.save_rankings:
        save_rankings(folder, scores.encoded.images, scores.encoded.captions, dataset, k, processes)
    log.info(results_table({dataset.split: results}))
    if "protocols" in results:
        log.info(protocols_table(results["protocols"]))
    if "rerank" in results:
        log.info(f"re-ranked, which needs more than the query and the items:\n{rerank_table(results['rerank'])}")
    log.info(f"wrote {folder / 'results.json'}")
    if options.run.report and processes.is_main:
        name = name_run(checkpoint.path if checkpoint else None, built.name)
        write_report(folder / REPORT, Evaluated(name, dataset, scores.encoded, scores.ranks, results))
