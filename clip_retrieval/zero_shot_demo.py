"""Show a model's predictions: the top five labels of each image, printed and drawn, as in clip-training's demo.

python scripts/zero_shot_demo.py --resume logs/ex0/best.pt --img_dir photos --show_prediction
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_retrieval.classification.class_names import OFFICIAL_NAMES, clean_name, imagenet_names, read_names
from clip_retrieval.classification.embeddings import prompt_classes
from clip_retrieval.classification.folder import list_images, log_skipped
from clip_retrieval.classification.templates import choose_templates
from clip_retrieval.data.images.decode import decode_rgb
from clip_retrieval.data.images.photographs import Photographs
from clip_retrieval.device import choose_device
from clip_retrieval.errors import NotFiniteError, UserError, format_counts
from clip_retrieval.files import path_exists
from clip_retrieval.log import log, start_log
from clip_retrieval.reporting.figures import Panel, draw_predictions, find_drawn_pages
from clip_retrieval.run.folder import make_folder
from clip_retrieval.run.model import load_model, warn_of_random_weights
from clip_retrieval.run.settings import settle_options

TOP_LABELS = 5
LABEL_SETS = (*OFFICIAL_NAMES, "imagenet")


@dataclass(frozen=True)
class Demo:
    """Options of the demo.

    Attributes:
        img_path, img_dir: an image, or a folder of images; exactly one of them.
        show_prediction: also draw a figure.
        labels: name of a label set, a file of labels, or comma-separated labels.
        templates, template: see `choose_templates`; "a photo of a {}." by default.
        temperature: divides the cosines before the softmax (default: the model's own, 1 / exp(logit_scale)).
        output: folder of the figures.
    """

    img_path: Path | None = None
    img_dir: Path | None = None
    show_prediction: bool = False
    labels: str = "cifar100"
    templates: str | None = None
    template: tuple[str, ...] = ()
    temperature: float | None = None
    output: Path = Path("demo_output")

    def __post_init__(self) -> None:
        if (self.img_path is None) == (self.img_dir is None):
            raise UserError("give exactly one of --img_path (an image) and --img_dir (a folder of images)")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature:g}: must be a number greater than 0")
        if self.temperature is not None and math.isinf(1 / self.temperature):
            raise UserError(f"--temperature {self.temperature:g}: too small; give a larger one")

    @property
    def figure(self) -> Path:
        """The file to draw; many images are drawn on several pages with this name."""
        name = self.img_path.stem if self.img_path else self.img_dir.resolve().name if self.img_dir else ""
        return self.output / f"zero_shot_{name}.png"


def show(typed: dict[str, Any], demo: Demo) -> None:
    """Print the model's predictions for each image, and draw them if demo.show_prediction."""
    # read images, labels and templates
    start_log()
    options, checkpoint = settle_options({**typed, "eval": True})
    device = choose_device(options.run.device)
    names = read_labels(demo.labels)
    templates = choose_templates(demo.templates, demo.template, names, default="single")
    if demo.img_path:
        check_image(demo.img_path)
        paths = [demo.img_path]
    elif demo.img_dir:
        paths = find_readable_images(demo.img_dir, demo.figure)
    if demo.show_prediction:
        make_folder(demo.output, "--output")
    # encode
    model, built, tokenizer = load_model(options, checkpoint)
    warn_of_random_weights(built)
    images = Photographs([str(path) for path in paths])
    inputs = prompt_classes("demo", images, names, templates, tokenizer, built.preprocess)
    workers = options.data.num_workers
    features = inputs.encode(model.to(device), options.evaluation, num_workers=workers, device=device)
    check_finite(features.images, "image", [str(path) for path in paths])
    check_finite(features.classes, "label", names)
    # predict, print and draw
    scale = 1 / demo.temperature if demo.temperature else float(model.clip.logit_scale.detach().exp())
    if not math.isfinite(scale):
        raise NotFiniteError(f"{built.name}, {built.weights}: exp(logit_scale) is not finite; give a --temperature")
    predictions = best_labels(probabilities(features.images, features.classes, scale), names)
    for path, bars in zip(paths, predictions):
        log.info("\n".join([path.name, *(f"{percent:8.2f}%  {name}" for name, percent in bars)]))
    if demo.show_prediction:
        prompts = templates.texts[0] if len(templates.texts) == 1 else f"{templates.name} ({len(templates.texts)})"
        weights = "/".join(Path(options.run.resume or built.weights).parts[-2:])
        heading = (
            f"{built.name}, {weights}, zero-shot, {format_counts(label=len(names))}, prompts: {prompts.rstrip('.')}"
        )
        heading += f", temperature {1 / scale:.3g}" * (demo.temperature is not None)
        rows = enumerate(zip(paths, predictions))
        panels = [Panel(path.name, partial(images.__getitem__, row), bars) for row, (path, bars) in rows]
        for path in draw_predictions(panels, demo.figure, heading):
            log.info(f"wrote {path}")


def read_labels(source: str) -> list[str]:
    """The labels of a set, of a file, or of a comma-separated list. Raises UserError for fewer than two."""
    if source in OFFICIAL_NAMES:
        return [clean_name(name) for name in OFFICIAL_NAMES[source]]
    if source == "imagenet":
        return list(imagenet_names().values())
    if path_exists(source):
        names = read_names(Path(source))
        if len(names) < 2:
            raise UserError(f"--labels {source}: holds one label; give several")
        return names
    labels = [label for part in re.split("[,，、]", source) if (label := clean_name(part))]
    if len(labels) < 2:
        raise UserError(
            f"--labels {source}: no such file, none of {', '.join(LABEL_SETS)}, and only one label; give several, as "
            '"cat,dog"'
        )
    return labels


def check_image(path: Path) -> None:
    """Raise UserError unless the path is a readable image."""
    if path.is_dir():
        raise UserError(f"--img_path {path}: a folder; give it as --img_dir")
    if not path.exists():
        raise UserError(f"--img_path {path}: no such file")
    decode_rgb(str(path), str(path))


def find_readable_images(folder: Path, figure: Path) -> list[Path]:
    """The images of a folder, sorted by name. Other files are skipped and logged; pages of `figure` are skipped.

    Raises UserError if there is no readable image.
    """
    if not folder.is_dir():
        raise UserError(f"--img_dir {folder}: no such folder; give a single image as --img_path")
    paths, others = list_images(folder, recursive=False)
    log_skipped(folder, others)
    drawn = {path.resolve() for path in find_drawn_pages(figure)}
    readable = []
    for path in (path for path in paths if path.resolve() not in drawn):
        try:
            decode_rgb(str(path), str(path))
        except UserError as error:
            log.warning(f"skipped: {error}")
        else:
            readable.append(path)
    if not readable:
        raise UserError(f"--img_dir {folder}: holds no readable images")
    return readable


def check_finite(features: Tensor, kind: str, names: Sequence[str]) -> None:
    """Raise NotFiniteError, naming the first row of features (rows, dim) that is not finite."""
    for name, is_finite in zip(names, features.isfinite().all(1).tolist()):
        if not is_finite:
            raise NotFiniteError(f'{kind} "{name}": feature is not finite and cannot be scored')


def probabilities(images: Tensor, classes: Tensor, scale: float) -> Tensor:
    """The softmax over classes of scale * cosine, float64 (images, classes).

    images (images, dim) and classes (classes, dim) are L2-normalised.
    """
    cosines = images.double().cpu() @ classes.double().cpu().T
    # Subtract the maximum before scaling, so a large scale cannot overflow.
    return torch.softmax(scale * (cosines - cosines.amax(1, keepdim=True)), dim=1)


def best_labels(shares: Tensor, names: Sequence[str]) -> list[list[tuple[str, float]]]:
    """The top labels of each row of probabilities (images, classes), with their percentages, best first."""
    percent, best = (100 * shares).sort(dim=1, descending=True, stable=True)
    return [
        [(names[label], value) for label, value in zip(row[:TOP_LABELS], values[:TOP_LABELS])]
        for row, values in zip(best.tolist(), percent.tolist())
    ]
