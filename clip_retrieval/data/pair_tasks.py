"""Tasks that ask a model to choose between a few captions or images: Winoground, SugarCrepe and ARO.

    task = read_task("sugarcrepe", Path("sugar-crepe/data"), Path("val2017"))

The files are those that the authors publish:

- Winoground (arXiv:2204.03162): `examples.jsonl` with image_0, image_1, caption_0, caption_1 and collapsed_tag;
- SugarCrepe (arXiv:2306.14610): a folder of `add_att.json`, ..., objects of {"filename", "caption",
  "negative_caption"}; each file is a category;
- ARO (arXiv:2210.01936): `visual_genome_relation.json` and `visual_genome_attribution.json`, lists of {"image_path",
  "true_caption", "false_caption", "bbox_x", ...}, whose images are cropped to the box. COCO-Order and Flickr30k-Order
  are made at random by ARO's code; a list of its test cases, {"image", "caption_options": [true, false, ...]}, is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_retrieval.data.captions import clean_caption
from clip_retrieval.data.dataset import UNSPLIT, RetrievalDataset
from clip_retrieval.data.images.image_files import ImageFiles, find_image_files
from clip_retrieval.errors import UserError
from clip_retrieval.files import read_json
from clip_retrieval.jsonl import read_records

TASKS = ("winoground", "sugarcrepe", "aro")

Box = tuple[int, int, int, int]
"""Left, upper, right and lower border, in pixels."""


@dataclass
class Examples:
    """The examples of a category.

    Attributes:
        images: the image indices of each example, one or two.
        captions: the caption indices of each example. With one image, the first caption is the true one; with two
            images, caption i belongs to image i.
        groups: the relation, the pair of attributes or the tag of each example; empty if there is none.
    """

    images: list[tuple[int, ...]] = field(default_factory=list)
    captions: list[tuple[int, ...]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PairTask:
    """A task: its distinct images and captions, without pairs, and its examples by category."""

    name: str
    dataset: RetrievalDataset
    categories: dict[str, Examples]


class CroppedImages:
    """Images that are cropped to boxes; a box of None is the whole image."""

    def __init__(self, files: ImageFiles, boxes: list[Box | None]):
        self.files, self.boxes = files, boxes

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Image.Image:
        image, box = self.files[index], self.boxes[index]
        if box is None:
            return image
        left, upper, right, lower = box
        # as large as the image at most, and partly within it: PIL would fill the rest with black
        fits = 0 < right - left <= image.width and 0 < lower - upper <= image.height
        if not (fits and right > 0 and left < image.width and lower > 0 and upper < image.height):
            size = f"{image.width} x {image.height}"
            raise UserError(f"{self.name(index)}: the box {box} does not fit an image of {size}; correct its bbox")
        return image.crop(box)

    def name(self, index: int) -> str:
        return self.files.name(index)


def read_task(name: str, data: Path, image_dir: Path) -> PairTask:
    """Read a task of TASKS.

    Args:
        name: the task.
        data: the file of examples, or the folder of the files.
        image_dir: the folder of the images.

    Raises UserError, naming file and example, if a file or an image is missing, or an example is invalid.
    """
    images: dict[tuple[str, Box | None], int] = {}
    captions: dict[str, int] = {}
    categories: dict[str, Examples] = {}
    for path in _find_files(name, data):
        examples = categories.setdefault(name if name == "winoground" else path.name.split(".")[0], Examples())
        for place, record in _read_examples(path):
            try:
                names, box, texts, group = _parse(name, record)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                detail = f"no {error}" if isinstance(error, KeyError) else str(error)
                raise UserError(f"{place}: not an example of {name} ({detail}); give the published file") from None
            examples.images.append(tuple(images.setdefault((image, box), len(images)) for image in names))
            texts = [clean_caption(text) for text in texts]
            examples.captions.append(tuple(captions.setdefault(text, len(captions)) for text in texts))
            examples.groups.append(group)
            if len(examples.captions[-1]) != len(examples.captions[0]):
                raise UserError(f"{place}: has {len(texts)} captions, the first example {len(examples.captions[0])}")
        if not examples.images:
            raise UserError(f"{path}: holds no examples; give the published file")
    files = find_image_files([(image_dir, [image for image, _ in images])], data)
    found = CroppedImages(files, [box for _, box in images])
    dataset = RetrievalDataset(name, UNSPLIT, found, list(captions), np.empty((0, 2), np.int64))
    return PairTask(name, dataset, categories)


def _find_files(name: str, data: Path) -> list[Path]:
    """The file itself, or the files of the task in a folder."""
    if not data.is_dir():
        return [data]
    pattern = "examples.jsonl" if name == "winoground" else "*.json"
    found = sorted(data.glob(pattern))
    if not found:
        raise UserError(f"{data}: holds no {pattern}; give the folder of the published files, or one of them")
    return found


def _read_examples(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (file and example for messages, record) of a list, an object of records, or JSON lines."""
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from ((f"{path}, line {line}", record) for line, record in read_records(path))
        return
    content = read_json(path)
    if not isinstance(content, (list, dict)):
        raise UserError(f"{path}: neither a list nor an object of examples; give the published file")
    items: Iterable[tuple[Any, Any]] = content.items() if isinstance(content, dict) else enumerate(content)
    yield from ((f"{path}, example {key}", record) for key, record in items)


def _parse(name: str, record: dict[str, Any]) -> tuple[list[str], Box | None, list[str], str]:
    """The image names, the box, the captions and the group of an example."""
    box, group = None, ""
    if name == "winoground":
        images = [record["image_0"], record["image_1"]]
        images = [image if Path(image).suffix else f"{image}.png" for image in images]
        captions = [record["caption_0"], record["caption_1"]]
        group = record.get("collapsed_tag", "")
    elif name == "sugarcrepe":
        images, captions = [record["filename"]], [record["caption"], record["negative_caption"]]
    elif "caption_options" in record:
        images, captions = [record["image"]], record["caption_options"]
        if not isinstance(captions, list):
            raise ValueError(f"caption_options is no list: {captions!r:.50}")
    else:
        images, captions = [record["image_path"]], [record["true_caption"], record["false_caption"]]
        left, upper, width, height = (int(record[f"bbox_{side}"]) for side in "xywh")
        box = (left, upper, left + width, upper + height)
        group = record["relation_name"] if "relation_name" in record else "_".join(record["attributes"])
    for text in (*images, *captions, group):
        if not isinstance(text, str):
            raise ValueError(f"{text!r:.50} is not a text")
    if len(captions) < 2:
        raise ValueError("fewer than two captions")
    return images, box, captions, group
