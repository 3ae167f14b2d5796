"""The evaluation run: a model, a split, exact recalls, results.json.

python main.py --eval --resume logs/ex0/best.pt
python main.py --eval --vision_model ViT-L/14 --dataset_root DATA
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_retrieval.data.dataset import UNSPLIT
from clip_retrieval.device import choose_device, device_name
from clip_retrieval.distributed import Processes, process_group
from clip_retrieval.errors import UserError
from clip_retrieval.evaluation.evaluator import score
from clip_retrieval.log import log, log_to_file, start_log
from clip_retrieval.models.checkpoint import Checkpoint
from clip_retrieval.options import AUTO, Options
from clip_retrieval.reporting.results import write_options, write_results
from clip_retrieval.reporting.table import rerank_table, results_table
from clip_retrieval.run.ensemble import load_ensemble
from clip_retrieval.run.folder import evaluation_folder, make_folder
from clip_retrieval.run.model import record_model_name
from clip_retrieval.run.reranking import rerank
from clip_retrieval.run.settings import settle_options
from clip_retrieval.run.splits import count_trained, describe_prefix, log_samples, read_split


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
    # read the data, then load the model, which may be a download
    device = choose_device(options.run.device)
    dataset = read_split(options.data, options.evaluation.eval_split, device, processes)
    if dataset is None:
        raise UserError(
            f"{options.data.name} in {options.data.place} has no "
            f"{options.evaluation.eval_split} split; choose another --eval_split, or other data"
        )
    others = [Checkpoint.load_if_ours(Path(path)) for path in options.evaluation.ensemble or ()]
    trained_on = max(count_trained(dataset, options, member) for member in (checkpoint, *others))
    if trained_on and dataset.split != UNSPLIT:
        dataset = replace(dataset, split="train")  # held out here, but not in training
    ensemble = load_ensemble(options, checkpoint, device, processes)
    built = ensemble.members[0].built
    options = record_model_name(options, built)
    log_samples(dataset)

    # make the output folder
    folder = evaluation_folder(
        options,
        built.name,
        checkpoint.path if checkpoint else None,
        named="experiments" in typed and typed.get("resume") != AUTO,
    )
    if processes.is_main:
        make_folder(folder)
        log_to_file(folder)
        write_options(folder, options, f"{device} ({device_name(device)})")

    # encode and score
    encoded = ensemble.encode(dataset)
    block = score(encoded, dataset, options.evaluation, processes)
    if options.evaluation.rerank:
        block["rerank"] = rerank(ensemble, encoded, dataset)

    # write the results
    if processes.is_main:
        settings = {"decoder": options.data.decoder} | describe_prefix(options.data)
        results = {"model": ensemble.name, **settings, **block, "weights": built.weights, **ensemble.describe()}
        results |= {"images_trained_on": trained_on} if trained_on else {}
        write_results(folder, results)
    log.info(results_table({dataset.split: block}))
    if options.evaluation.rerank:
        log.info(f"re-ranked, which needs more than the query and the items:\n{rerank_table(block['rerank'])}")
    log.info(f"wrote {folder / 'results.json'}")
