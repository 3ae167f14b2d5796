"""Small finetunes for the campaigns, and a bit-for-bit comparison of their outputs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.data.make_shards import shards_of_csv
from tests.faults.hostile.case import model_config
from tests.faults.program import Ended, Program, Settings
from tests.faults.readers.reader import CAPTIONS, write_images

CLOCK = ("pairs_per_second", "data_percent", "seconds", "command_line")
"""Measured times in metrics.jsonl, results.json and checkpoints; they may differ."""
PLACES = ("checkpoint_path", "experiments", "resume", "image_cache")
"""Paths of a run; they may differ too."""
Options = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes:
        name: name of the kind.
        options: its command line.
    """

    name: str
    options: Options


COMMON: Options = {
    "epochs": 2,
    "batch_size": 4,
    "lr": "1e-3",
    "warmup": 2,
    "display": 1,
    "device": "cpu",
    "num_workers": 0,
    "save_every": 1,
    "keep_every": 1,
    "keep_steps": 2,
}
CSV: Options = {"dataset": "csv", "annotations": "DATA/captions.csv", "vision_model": "DATA/micro.json"}
SHARDS: Options = {"dataset": "webdataset", "dataset_root": "DATA/shards", "vision_model": "DATA/micro.json"}
KINDS = (
    Kind("csv", COMMON | CSV | {"augment": "crop"}),
    Kind(
        "csv, saved seldom",
        COMMON | CSV | {"save_every": 5, "keep_every": 0, "keep_steps": 0, "caption_sampling": "one"},
    ),
    Kind(
        "csv, steps", COMMON | CSV | {"epochs": 9, "max_steps": 7, "eval_steps": 3, "keep_steps": 3, "loss": "siglip"}
    ),
    Kind("shards", COMMON | SHARDS | {"shuffle_buffer": 8}),
    Kind("two loaders", COMMON | CSV | {"num_workers": 2}),
    Kind("image cache, adaptor", COMMON | CSV | {"image_cache": "OWN/cache", "trainable": "adaptor", "loss": "margin"}),
)
LOADERS = next(kind for kind in KINDS if kind.name == "two loaders")


def write_inputs(folder: Path) -> Path:
    """Write the data and the model of all kinds: 18 train pairs, 6 val pairs and 6 test pairs."""
    data = folder / "data"
    data.mkdir(parents=True)
    write_images(data, [f"{i}.jpg" for i in range(15)])
    splits = ["train"] * 9 + ["val"] * 3 + ["test"] * 3
    rows = [f"{i}.jpg,{CAPTIONS[j]} {i},{split}" for i, split in enumerate(splits) for j in (0, 1)]
    (data / "captions.csv").write_text("image,caption,split\n" + "\n".join(rows) + "\n")
    (data / "micro.json").write_text(json.dumps(model_config()))
    shards_of_csv(data / "captions.csv", data / "shards")
    return data


@dataclass(frozen=True)
class Place:
    """The folder of a run, and that of its data."""

    folder: Path
    data: Path

    @property
    def output(self) -> Path:
        return self.folder / "logs" / "run"

    def typed(self, kind: Kind, *more: object, resume: bool = True) -> list[object]:
        """The command line; with `resume`, it starts a run or resumes it."""
        words: list[object] = ["--checkpoint_path", self.folder / "logs", "--experiments", "run"]
        for name, value in kind.options.items():
            text = str(value).replace("DATA", str(self.data)).replace("OWN", str(self.folder))
            words += [f"--{name}", text]
        return [*words, *(("--resume", "auto") if resume else ()), *more]

    def start(
        self, kind: Kind, *more: object, before: Callable | None = None, arguments: tuple = (), **options: Any
    ) -> Program:
        """Start or resume the run; `before` injects faults."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = Settings(self.folder, before=before, arguments=arguments)
        return Program(self.typed(kind, *more, **options), settings)


def finish(place: Place, kind: Kind, deadline: float = 120.0) -> Ended:
    """Start or resume a run, undisturbed, and wait for its end."""
    return place.start(kind).wait(deadline)


def differences(output: Path, undisturbed: Path) -> list[str]:
    """The differences between the outputs of a run and those of an undisturbed run; empty if there are none."""
    found = []
    names = [{path.name for path in folder.iterdir() if path.is_file()} for folder in (undisturbed, output)]
    kept = [{name for name in each if name.endswith((".pt", ".json", ".jsonl", ".txt"))} for each in names]
    if kept[0] != kept[1]:
        found.append(f"missing files {sorted(kept[0] - kept[1])}, more files {sorted(kept[1] - kept[0])}")
    if left := [name for name in names[1] if name.endswith(".tmp")]:
        found.append(f"half-written files {left}")
    for name in sorted(kept[0] & kept[1]):
        if name.endswith(".txt"):
            continue
        read = _read_checkpoint if name.endswith(".pt") else _read_lines
        before, after = read(undisturbed / name), read(output / name)
        found += [f"{name}: {difference}" for difference in _compare(before, after, "")][:5]
    return found


def _read_checkpoint(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def _read_lines(path: Path) -> Any:
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def _compare(before: Any, after: Any, path: str) -> Iterator[str]:
    """Yield the paths at which the values of two nested structures differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}, key=str):
            if key in CLOCK or key in PLACES:
                continue
            if key not in before or key not in after:
                yield f"{path}/{key} is {'missing' if key in before else 'more'}"
            else:
                yield from _compare(before[key], after[key], f"{path}/{key}")
    elif isinstance(before, (list, tuple)) and isinstance(after, (list, tuple)) and len(before) == len(after):
        for number, pair in enumerate(zip(before, after)):
            yield from _compare(*pair, f"{path}/{number}")
    elif isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        same = before.dtype == after.dtype and before.shape == after.shape
        if not same or before.numpy().tobytes() != after.numpy().tobytes():
            yield f"{path}: other numbers"
    elif before != after and not (isinstance(before, float) and math.isnan(before) and math.isnan(after)):
        yield f"{path}: {str(before)[:40]} and {str(after)[:40]}"
