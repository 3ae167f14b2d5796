"""Names of folders and files that are not UTF-8, classes, archives, and limited machines."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.faults.hostile.case import EITHER, VALID, Case, evaluate, finetune, write_data
from tests.faults.readers.reader import encoded_image

ODD = os.fsdecode(b"caf\xe9-\xff")


def _data_with_odd_names(folder: Path) -> list[object]:
    """A dataset whose folder, images and captions file have names that are not UTF-8."""
    place = folder / ODD
    place.mkdir()
    write_data(place)
    return evaluate(folder, "--annotations", place / "good.csv", "--image_dir", place)


def _output_with_odd_name(folder: Path) -> list[object]:
    return finetune(folder, "--checkpoint_path", folder / ODD, "--experiments", ODD)


def _classes(folder: Path) -> list[object]:
    for number, name in enumerate(("dog", ODD, "a\nb")):
        (folder / "classes" / name).mkdir(parents=True)
        (folder / "classes" / name / f"{ODD}.jpg").write_bytes(encoded_image(number))
    return finetune(folder, "--zero_shot_eval", folder / "classes")


def _long_name(folder: Path) -> list[object]:
    return finetune(folder, "--experiments", "a" * 300)


def _output_in_a_file(folder: Path) -> list[object]:
    (folder / "file").write_text("")
    return finetune(folder, "--checkpoint_path", folder / "file")


def _output_in_dev(folder: Path) -> list[object]:
    return finetune(folder, "--checkpoint_path", "/dev/null", "--experiments", "x")


def _class_fifo(folder: Path) -> list[object]:
    (folder / "classes" / "dog").mkdir(parents=True)
    (folder / "classes" / "cat").mkdir()
    os.mkfifo(folder / "classes" / "dog" / "0.jpg")
    (folder / "classes" / "cat" / "0.jpg").write_bytes(encoded_image(0))
    return finetune(folder, "--zero_shot_eval", folder / "classes")


def _class_names_fifo(folder: Path) -> list[object]:
    typed = _class_fifo(folder)
    (folder / "classes" / "dog" / "0.jpg").unlink()
    (folder / "classes" / "dog" / "0.jpg").write_bytes(encoded_image(1))
    os.mkfifo(folder / "names.txt")
    return [*typed, "--zero_shot_class_names", folder / "names.txt"]


def _templates_fifo(folder: Path) -> list[object]:
    typed = _class_names_fifo(folder)[:-2]
    return [*typed, "--zero_shot_templates", folder / "names.txt"]


def _feature_fifo(name: str) -> Callable[[Path], list[object]]:
    def make(folder: Path) -> list[object]:
        os.mkfifo(folder / name)
        return ["--image-feats", folder / name, "--text-feats", folder / name, "--output", folder / "out.jsonl"]

    return make


def _archive_fifo(folder: Path) -> list[object]:
    os.mkfifo(folder / "cifar-10-python.tar.gz")
    return finetune(folder, "--zero_shot_eval", "cifar10", "--zero_shot_root", folder)


TOPK = "scripts/make_topk_predictions.py"
PLACES = (
    Case("names: a data set that is not UTF-8", _data_with_odd_names, VALID),
    Case("names: an output folder that is not UTF-8", _output_with_odd_name, VALID),
    Case("names: classes that are not UTF-8", _classes, VALID),
    Case("names: an output of 300 characters", _long_name),
    Case("names: an output in a file", _output_in_a_file),
    Case("names: an output in a device", _output_in_dev),
    Case("classes: a FIFO", _class_fifo),
    Case("classes: names in a FIFO", _class_names_fifo),
    Case("classes: templates in a FIFO", _templates_fifo),
    Case("classes: an archive that is a FIFO", _archive_fifo, EITHER),
    Case("features: a FIFO", _feature_fifo("a.jsonl"), script=TOPK),
    Case("features: a FIFO of numbers", _feature_fifo("a.npy"), script=TOPK),
)
