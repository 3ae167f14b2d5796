"""What a model takes images for: the five best labels of each, printed and drawn, as clip-training's demo does.

python scripts/zero_shot_demo.py --resume logs/ex0/best.pt --img_dir photos --show_prediction
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from clip_retrieval.classification.class_names import OFFICIAL_NAMES, clean_name, imagenet_names, read_names
from clip_retrieval.classification.embeddings import prompt_classes
from clip_retrieval.classification.folder import list_images, log_skipped
from clip_retrieval.classification.templates import choose_templates
from clip_retrieval.data.images.decode import as_rgb, decode_rgb
from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.device import choose_device
from clip_retrieval.errors import NotFiniteError, UserError
from clip_retrieval.files import path_exists
from clip_retrieval.log import log, start_log
from clip_retrieval.reporting.figures import Panel, draw_predictions, find_drawn_pages
from clip_retrieval.run.folder import make_folder
from clip_retrieval.run.model import load_model, warn_of_random_weights
from clip_retrieval.run.settings import settle_options

SHOWN = 5
SETS = (*OFFICIAL_NAMES, "imagenet")


@dataclass(frozen=True)
class Demo:
    """What is to be shown.

    Attributes:
        img_path, img_dir: an image, or a folder of images; one of the two.
        show_prediction: draw a figure as well.
        labels: a set of labels, a file of them, or labels separated by commas.
        templates, template: see `choose_templates`; "a photo of a {}." by default.
        temperature: what cosines are divided by before the softmax (default: the model's own, 1 / exp(logit_scale)).
        output: the folder of the figures.
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
            raise UserError("give --img_path, an image, or --img_dir, a folder of images: one of the two")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature:g}: must be a number greater than 0")
        if self.temperature is not None and math.isinf(1 / self.temperature):
            raise UserError(f"--temperature {self.temperature:g}: too small to divide by; give a larger one")

    @property
    def figure(self) -> Path:
        """The file that is drawn; many images take several pages of this name."""
        what = self.img_path.stem if self.img_path else self.img_dir.resolve().name
        return self.output / f"zero_shot_{what}.png"


def show(typed: dict[str, Any], demo: Demo) -> None:
    """Print, and draw where that is wanted, what the model of the options takes each image for."""
    start_log()
    options, checkpoint = settle_options({**typed, "eval": True})
    device = choose_device(options.run.device)
    names = read_labels(demo.labels)
    templates = choose_templates(demo.templates, demo.template, names, default="single")
    paths = [readable_image(demo.img_path)] if demo.img_path else readable_images(demo.img_dir, demo.figure)
    if demo.show_prediction:
        make_folder(demo.output, "--output")
    model, built, tokenizer = load_model(options, checkpoint)
    warn_of_random_weights(built)
    images = Photographs([str(path) for path in paths])
    ready = prompt_classes("demo", images, names, templates, tokenizer, built.preprocess)
    features = ready.encode(
        model.to(device),
        device=device,
        eval_batch_size=options.evaluation.eval_batch_size,
        num_workers=options.data.num_workers,
        precision=options.evaluation.eval_precision,
    )
    refuse_not_finite(features.images, "image", [str(path) for path in paths])
    refuse_not_finite(features.classes, "label", names)
    scale = 1 / demo.temperature if demo.temperature else float(model.clip.logit_scale.detach().exp())
    if not math.isfinite(scale):
        raise NotFiniteError(f"{built.name}, {built.weights}: exp(logit_scale) is not finite; give a --temperature")
    predictions = best_labels(probabilities(features.images, features.classes, scale), names)
    for path, bars in zip(paths, predictions):
        log.info("\n".join([path.name, *(f"{percent:8.2f}%  {name}" for name, percent in bars)]))
    if demo.show_prediction:
        words = templates.texts[0] if len(templates.texts) == 1 else f"{templates.name} ({len(templates.texts)})"
        weights = "/".join(Path(options.run.resume or built.weights).parts[-2:])
        heading = f"{built.name}, {weights}, zero-shot, {len(names):,} labels, prompts: {words.rstrip('.')}"
        heading += f", temperature {1 / scale:.3g}" * (demo.temperature is not None)
        _draw(demo, paths, images, predictions, heading)


def _draw(
    demo: Demo,
    paths: Sequence[Path],
    images: ImageFiles,
    predictions: Sequence[Sequence[tuple[str, float]]],
    heading: str,
) -> None:
    panels = [
        Panel(path.name, partial(images.__getitem__, row), bars)
        for row, (path, bars) in enumerate(zip(paths, predictions))
    ]
    for written in draw_predictions(panels, demo.figure, heading):
        log.info(f"wrote {written}")


def read_labels(asked: str) -> list[str]:
    """The labels of a set, of a file, or those that are typed, separated by commas. Raises UserError otherwise."""
    if asked in OFFICIAL_NAMES:
        return [clean_name(name) for name in OFFICIAL_NAMES[asked]]
    if asked == "imagenet":
        return list(imagenet_names().values())
    if path_exists(asked):
        names = read_names(Path(asked))
        if len(names) < 2:
            raise UserError(f"--labels {asked}: holds one label; give several")
        return names
    labels = [label for part in re.split("[,，、]", asked) if (label := clean_name(part))]
    if len(labels) < 2:
        raise UserError(f'--labels {asked}: no such file, none of {", ".join(SETS)}, and not several, as "cat,dog"')
    return labels


class Photographs(ImageFiles):
    """Images as a person sees them: upright, and white where they are transparent."""

    def __getitem__(self, index: int) -> Image.Image:
        return decode_rgb(self.paths[index], self.paths[index], prepare_photo)


def prepare_photo(image: Image.Image) -> Image.Image:
    """The image as RGB, turned as its EXIF says, and on white where it is transparent."""
    with suppress(Exception):  # of a broken EXIF, it may be any
        image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return as_rgb(image)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def readable_image(path: Path) -> Path:
    """The path, where it is an image. Raises UserError otherwise."""
    if path.is_dir():
        raise UserError(f"--img_path {path}: a folder; give it as --img_dir")
    if not path.exists():
        raise UserError(f"--img_path {path}: no such file")
    decode_rgb(str(path), str(path))
    return path


def readable_images(folder: Path, figure: Path) -> list[Path]:
    """The images in a folder, by name; what is no image is left out, and said, and so is the figure that is drawn.

    Raises UserError where none is left.
    """
    if not folder.is_dir():
        raise UserError(f"--img_dir {folder}: no such folder; a single image is given as --img_path")
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


def refuse_not_finite(features: Tensor, kind: str, names: Sequence[str]) -> None:
    """Raise NotFiniteError, with the name of the first row of features (rows, dim) that is not finite."""
    for name, finite in zip(names, features.isfinite().all(1).tolist()):
        if not finite:
            raise NotFiniteError(f'{kind} "{name}": feature is not finite; nothing can be scored against it')


def probabilities(images: Tensor, classes: Tensor, scale: float) -> Tensor:
    """float64 (images, classes): the softmax over the classes of scale times the cosine.

    images (images, dim) and classes (classes, dim) are L2-normalised.
    """
    cosines = images.double().cpu() @ classes.double().cpu().T
    return torch.softmax(scale * (cosines - cosines.amax(1, keepdim=True)), dim=1)  # no scale is too large so


def best_labels(shares: Tensor, names: Sequence[str]) -> list[list[tuple[str, float]]]:
    """For each row of probabilities (images, classes) the best few labels and their percent, best first."""
    percent, best = (100 * shares).sort(dim=1, descending=True, stable=True)
    return [
        [(names[label], value) for label, value in zip(row[:SHOWN], values[:SHOWN])]
        for row, values in zip(best.tolist(), percent.tolist())
    ]
