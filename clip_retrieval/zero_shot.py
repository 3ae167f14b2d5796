"""Score a model as a zero-shot classifier: encode class names as prompts, predict the nearest class.

python scripts/zero_shot.py --resume logs/ex0/best.pt --data cifar100 --data_root DIR
python scripts/zero_shot.py --vision_model ViT-B/32 --data imagenet --data_root DIR/val
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_retrieval.classification.folder import LabelledImages
from clip_retrieval.classification.labelled_sets import IMAGENET, ZeroShotData, read_labelled
from clip_retrieval.classification.report import per_class_table, summary
from clip_retrieval.classification.task import make_task, score_task
from clip_retrieval.classification.templates import Templates
from clip_retrieval.device import choose_device, device_name
from clip_retrieval.distributed import process_group
from clip_retrieval.errors import printable
from clip_retrieval.files import write_text
from clip_retrieval.log import log, log_to_file, start_log
from clip_retrieval.options import EvalOptions
from clip_retrieval.reporting.results import write_options, write_results
from clip_retrieval.run.folder import make_folder, results_folder
from clip_retrieval.run.model import load_model, record_model_name, warn_of_random_weights
from clip_retrieval.run.settings import settle_options

GENERIC_NAMES = ("test", "val", "valid", "validation", "train", "images", "data")


def classify(typed: dict[str, Any], request: ZeroShotData, output: Path | None = None) -> None:
    """Score the model of the options, and write results.json and results.txt.

    Args:
        typed: options of the model and of the evaluation.
        request: data set, class names and templates.
        output: folder of the results (default: a new folder beside the checkpoint, or in --checkpoint_path).
    """
    start_log()
    options, checkpoint = settle_options({**typed, "eval": True})
    with process_group(options.run.device) as processes:
        # read the data and load the model
        device = choose_device(options.run.device)
        with processes.main_first():  # may download or extract
            labelled, templates = read_labelled(request)
        with processes.main_first():
            model, built, tokenizer = load_model(options, checkpoint)
        options = record_model_name(options, built)
        warn_of_random_weights(built)
        # make the output folder
        name = data_name(labelled) + settings_suffix(request, templates)
        place = checkpoint.path if checkpoint else None
        folder = output or results_folder(options.run, "zero_shot", name, model=built.name, beside=place)
        if processes.is_main:
            make_folder(folder, "--output")
            log_to_file(folder)
        # score the model and write the results
        block = score_task(
            model.to(device),
            make_task(labelled, templates, tokenizer, built.preprocess),
            options.evaluation,
            num_workers=options.data.num_workers,
            device=device,
            processes=processes,
        )
        table = per_class_table(block)
        if processes.is_main:
            recorded = replace(options, evaluation=record_data(options.evaluation, request))
            write_options(folder, recorded, f"{device} ({device_name(device)})")
            write_results(folder, {"model": built.name, "weights": built.weights, **block})
            sources = [f"{name}: {block[name]}" for name in ("data_root", "class_names") if block[name]]
            sources.append(f"templates: {templates.name} ({len(templates.texts)}), {templates.texts[0]}")
            text = "\n".join([f"{built.name}, weights: {built.weights}", *sources, summary(block), "", table, ""])
            write_text(folder / "results.txt", printable(text))
        log.info(f"\n{table}\n\n{summary(block)}")
        log.info(f"wrote {folder / 'results.json'} and results.txt")


def data_name(labelled: LabelledImages) -> str:
    """A name for the results that differs between data sets.

    Variants of ImageNet are named after their folder. The parent's name precedes a generic folder name such as test.
    """
    place = labelled.place.resolve() if labelled.place else Path()
    if labelled.name != IMAGENET:
        is_generic = place.name == labelled.name and place.name.lower() in GENERIC_NAMES
        return f"{place.parent.name}_{place.name}" if is_generic and place.parent.name else labelled.name
    if place.name.lower() in (IMAGENET, "val", ""):
        return labelled.name
    return place.name if place.name.lower().startswith(IMAGENET) else f"{IMAGENET}_{place.name}"


def settings_suffix(request: ZeroShotData, templates: Templates) -> str:
    """A suffix for results with other templates or class names than the default, e.g. `_simple_names`."""
    templates_name = Path(templates.name).stem if request.templates or request.template else ""
    names = request.class_names.stem if request.class_names else ""
    return "".join(f"_{part}" for part in (templates_name, names, "all" * request.all_classes) if part)


def record_data(options: EvalOptions, request: ZeroShotData) -> EvalOptions:
    """Copy the request into the options, under main.py's option names."""
    return replace(
        options,
        zero_shot_eval=request.data,
        zero_shot_root=str(request.data_root),
        zero_shot_class_names=str(request.class_names) if request.class_names else None,
        zero_shot_templates=request.templates,
    )
