"""The definition of a case, its run and the check of its end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.program import Ended, Settings, run
from tests.faults.readers.models import RUN_TEXT, VISION
from tests.faults.readers.reader import CAPTIONS, write_images

MARKER = "marker"
"""Part of the name of each file that code in a hostile file would create."""
SECRET, HELD = "victim", "held before the run"
"""A file that no run may change, and its content."""
LONGEST = 540  # characters of a message, "error: " and a hint to --help included
MEMORY = 4 * 2**30  # bytes
DEADLINE = 120.0  # seconds; a run takes one

REFUSED, VALID, EITHER = "refused", "valid", "either"
Make = Callable[[Path], Sequence[object]]


@dataclass(frozen=True)
class Case:
    """One or more files that a run must refuse or read.

    Attributes:
        name: name of the case.
        make: writes the files into a folder and returns the arguments of the command line.
        wanted: REFUSED (exit code 2), VALID (0), or EITHER (0, 2 or 3).
        script: the program.
        words: required in the message if the file is refused.
    """

    name: str
    make: Make
    wanted: str = REFUSED
    script: str = "main.py"
    words: tuple[str, ...] = ()


def write_data(folder: Path) -> Path:
    """Write a CSV with four images and eight captions in three splits."""
    write_images(folder, [f"{i}.jpg" for i in range(4)])
    splits = ("train", "train", "train", "train", "val", "val", "test", "test")
    rows = [f"{i % 4}.jpg,{CAPTIONS[i % 2]} {i},{split}" for i, split in enumerate(splits)]
    (folder / "good.csv").write_text("image,caption,split\n" + "\n".join(rows) + "\n")
    return folder / "good.csv"


def write_model(folder: Path) -> Path:
    """Write the config of a model of 0.2 M parameters for CLIP's tokenizer."""
    path = folder / "micro.json"
    path.write_text(json.dumps(model_config()))
    return path


def model_config() -> dict:
    """The config of a small model."""
    return {"embed_dim": 8, "vision_cfg": dict(VISION), "text_cfg": dict(RUN_TEXT)}


def evaluate(folder: Path, *typed: object) -> list[object]:
    """The command line to evaluate a model on valid data; `typed` replaces options, or drops them if None."""
    data = ["--dataset", "csv", "--annotations", write_data(folder), "--vision_model", write_model(folder)]
    place = ["--checkpoint_path", folder / "logs", "--device", "cpu", "--num_workers", 0]
    return _merge("--eval", *data, "--pretrained", "none", *place, *typed)


def finetune(folder: Path, *typed: object) -> list[object]:
    """The command line to train for one step."""
    length = ["--max_steps", 1, "--batch_size", 2, "--warmup", 1, "--no_eval_first"]
    return _merge(*evaluate(folder)[1:], *length, *typed)


def _merge(*typed: object) -> list[object]:
    """Each option once, with its last value; an option without a value is a flag."""
    values: dict[str, list[object]] = {}
    for word in typed:
        if isinstance(word, str) and word.startswith("--"):
            option = word
            values[option] = []
        else:
            values[option].append(word)
    return [word for option, held in values.items() if held != [None] for word in (option, *held)]


def judge(case: Case, folder: Path) -> tuple[Ended, list[str]]:
    """Run a case; return its end and the problems found."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    secret = folder.parent / f"{folder.name}-{SECRET}"
    secret.write_text(HELD)
    typed = case.make(folder)
    # Replace programs that a file could start, such as Ghostscript or a browser.
    tools = folder / "bin"
    tools.mkdir()
    for name in ("gs", "gswin64c", "xdg-open"):
        (tools / name).write_text(f"#!/bin/sh\ntouch {folder}/{MARKER}-{name}\n")
        (tools / name).chmod(0o755)
    path = os.pathsep.join([str(tools), os.environ.get("PATH", "")])
    settings = Settings(folder, memory=MEMORY, environment={"PATH": path})
    ended = run(typed, settings, case.script, DEADLINE)
    return ended, list(_problems(case, ended, folder, secret))


def _problems(case: Case, ended: Ended, folder: Path, secret: Path) -> Iterator[str]:
    """Yield a description of each difference from the wanted end."""
    if ended.code is None:
        yield f"it hung for {DEADLINE:g} s"
        return
    codes = {REFUSED: (2,), VALID: (0,), EITHER: (0, 2, 3)}[case.wanted]
    if ended.code not in codes:
        yield f"exit code {ended.code}, not {' or '.join(map(str, codes))}"
    if ended.code and len(ended.errors) != 1:
        yield f"{len(ended.errors)} lines on standard error"
    if any(len(line) > LONGEST for line in ended.err.splitlines()):
        yield "a line of more than 500 characters"
    if ended.code == 2 and not all(word in ended.err for word in case.words):
        yield f"the message does not name {', '.join(word for word in case.words if word not in ended.err)}"
    if "Traceback" in ended.err:
        yield "a traceback"
    if made := [path.name for path in folder.rglob(f"*{MARKER}*")]:
        yield f"code of the file ran and made {', '.join(made)}"
    if not secret.exists() or secret.read_text(errors="replace") != HELD:
        yield "a file outside of the run was changed"
