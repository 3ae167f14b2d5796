"""The frame of an evaluation with data of its own: settle options, read, load the models, score, write results.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from clip_retrieval.device import choose_device, device_name
from clip_retrieval.distributed import process_group
from clip_retrieval.log import log, log_to_file, start_log
from clip_retrieval.reporting.results import write_options, write_results
from clip_retrieval.run.ensemble import Ensemble, load_ensemble
from clip_retrieval.run.folder import make_folder, results_folder
from clip_retrieval.run.model import record_model_name
from clip_retrieval.run.settings import settle_options
from clip_retrieval.run.splits import describe_prefix


def run_tool(
    typed: dict[str, Any],
    read: Callable[[], Any],
    score: Callable[[Ensemble, Any], tuple[dict[str, Any], str]],
    output: Path | None = None,
) -> None:
    """Score the models of the options, log a table, and write results.json.

    Args:
        typed: options of the command line about the model and its evaluation.
        read: reads the data, with a `dataset` that names the folder. It runs first: a model may be a download.
        score: returns the content of results.json and the table.
        output: folder of the results (default: named after the data, beside the checkpoint or in --checkpoint_path).
    """
    start_log()
    options, checkpoint = settle_options({**typed, "eval": True})
    with process_group(options.run.device) as processes:
        # read the data and load the models
        device = choose_device(options.run.device)
        data = read()
        ensemble = load_ensemble(options, checkpoint, device, processes)
        built = ensemble.members[0].built
        # make the output folder
        name = data.dataset.name + "_ensemble" * (len(ensemble.members) > 1)
        place = checkpoint.path if checkpoint else None
        folder = output or results_folder(options.run, name, model=built.name, beside=place)
        if processes.is_main:
            make_folder(folder, "--output")
            log_to_file(folder)
            write_options(folder, record_model_name(options, built), f"{device} ({device_name(device)})")
        # score, and write the results
        results, table = score(ensemble, data)
        head = {"model": ensemble.name, "weights": built.weights, "precision": options.evaluation.eval_precision}
        if processes.is_main:
            write_results(folder, head | describe_prefix(options.data) | ensemble.describe() | results)
    log.info(table)
    log.info(f"wrote {folder / 'results.json'}")
