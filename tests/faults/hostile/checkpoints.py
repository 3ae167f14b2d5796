"""Files that a run resumes from: checkpoints with crafted states, damaged logs, links in place of outputs."""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.faults.hostile.case import EITHER, SECRET, VALID, Case, evaluate, finetune
from tests.faults.hostile.models import _module
from tests.faults.program import Settings, run

Change = Callable[[dict[str, Any]], Any]
STEPS = ("--max_steps", 4, "--save_every", 1, "--eval_every", 0, "--experiments", "run")


@functools.cache
def _run_files() -> dict[str, bytes]:
    """The files of a run after two of its four steps."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        folder.mkdir()
        ended = run(finetune(folder, *STEPS, "--max_steps", 2), Settings(folder))
        if ended.code != 0:
            raise AssertionError(ended.err)
        place = folder / "logs" / "run"
        return {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}


def _write_run(folder: Path) -> list[object]:
    """Write the folder of a run; return the command line that resumes it."""
    place = folder / "logs" / "run"
    place.mkdir(parents=True)
    for name, content in _run_files().items():
        (place / name).write_bytes(content)
    return finetune(folder, *STEPS, "--resume", place / "last.pt")


def _craft(change: Change, program: str = "finetune") -> Callable[[Path], list[object]]:
    """A case with a last.pt altered by `change`."""

    def make(folder: Path) -> list[object]:
        typed = _write_run(folder)
        last = folder / "logs" / "run" / "last.pt"
        content = torch.load(io.BytesIO(last.read_bytes()), weights_only=True)
        del content["state_dict"]  # weights that differ from it would be refused before anything else is checked
        changed = change(content)
        torch.save(content if changed is None else changed, last)
        return typed if program == "finetune" else evaluate(folder, "--pretrained", None, "--resume", last)

    return make


def _set(*path: Any) -> Change:
    *keys, last, value = path

    def change(content: Any) -> None:
        for key in keys:
            content = content[key]
        content[last] = value

    return change


def _moments(alter: Callable[[torch.Tensor], Any], names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")) -> Change:
    def change(content: dict[str, Any]) -> None:
        for state in content["optimizer"]["state"].values():
            for name in names:
                state[name] = alter(state[name])

    return change


def _group(name: str, value: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        for group in content["optimizer"]["param_groups"]:
            group[name] = value

    return change


OPTIMIZER: dict[str, Change] = {
    "moments of one number": _moments(lambda t: torch.ones(1)),
    "moments of no number": _moments(lambda t: t.flatten()[:0]),
    "moments of another shape": _moments(lambda t: torch.ones(3, 5)),
    "longer moments": _moments(lambda t: torch.ones(t.numel() * 1000)),
    "transposed moments": _moments(lambda t: t.mT if t.ndim == 2 else t),
    "moments by stride 0": _moments(lambda t: torch.zeros(()).expand(t.shape)),
    "integer moments": _moments(lambda t: t.long()),
    "complex moments": _moments(lambda t: t.to(torch.complex64)),
    "meta moments": _moments(lambda t: t.to("meta")),
    "sparse moments": _moments(lambda t: t.to_sparse()),
    "NaN moments": _moments(lambda t: torch.full_like(t, float("nan"))),
    "moments that are texts": _moments(lambda t: "x"),
    "no second moments": lambda content: [s.pop("exp_avg_sq") for s in content["optimizer"]["state"].values()] and None,
    "a step of another shape": _moments(lambda t: torch.ones(7), ("step",)),
    "a step that is a text": _moments(lambda t: "x", ("step",)),
    "a step below 0": _moments(lambda t: torch.tensor(-5.0), ("step",)),
    "a step of NaN": _moments(lambda t: torch.tensor(float("nan")), ("step",)),
    "no groups": _set("optimizer", "param_groups", []),
    "no state": _set("optimizer", "state", 3),
    "state of parameters that are not there": _set("optimizer", "state", 10**9, {"step": torch.ones(())}),
    "a group without parameters": _group("params", []),
    "parameters that are texts": _group("params", ["x"]),
    "betas that are texts": _group("betas", "xy"),
    "amsgrad": _group("amsgrad", True),
    "fused and foreach": lambda content: (
        [g.update(fused=True, foreach=True) for g in content["optimizer"]["param_groups"]] and None
    ),
    "a key more": _group("more", torch.ones(3)),
    "a learning rate of NaN": _group("lr", float("nan")),
    "maximize": _group("maximize", True),
}
PARTS: dict[str, Change] = {
    **{
        f"{name} is a number": _set(name, 3)
        for name in ("model", "state_dict", "model_config", "preprocess", "options", "optimizer")
    },
    **{f"{name} is a list": _set(name, [1]) for name in ("learning", "scaler", "random", "sampler", "progress")},
    **{f"{name} is empty": _set(name, {}) for name in ("model", "model_config", "preprocess", "options", "learning")},
    **{f"{name} is empty too": _set(name, {}) for name in ("optimizer", "random", "sampler", "progress")},
    "a step of 10^400": _set("step", 10**400),
    "a step below 0": _set("step", -1),
    "a step that is true": _set("step", True),
    "a progress of texts": _set("progress", "step", "x"),
    "a progress of 10^18 steps": _set("progress", "step", 10**18),
    "a progress below 0": _set("progress", "step", -3),
    "a progress with more": _set("progress", "more", 1),
    "a best that is a text": _set("progress", "best", "x"),
    "a best without a step": _set("progress", "best", {}),
    "seconds of NaN": _set("progress", "seconds", float("nan")),
    "a batch size of texts": _set("sampler", "batch_size", "x"),
    "data of a tensor": _set("sampler", "data", torch.ones(3)),
    "no data": lambda content: content["sampler"].pop("data") and None,
    "options of tensors": _set("options", "lr", torch.ones(3)),
    "options of lists": _set("options", "vision_model", [1, 2]),
    "a vision model of a number": _set("options", "vision_model", 3),
    "no vision model": lambda content: content["options"].pop("vision_model") and None,
    "a batch size of 10^18": _set("options", "eval_split", "nowhere"),
    "a NUL in a path": _set("options", "annotations", "a\0b"),
    "half a surrogate pair in a path": _set("options", "dataset_root", "\ud800"),
    "weights of integers": lambda content: content["model"].update({k: v.long() for k, v in content["model"].items()}),
    "weights of NaN": lambda content: content["model"].update(
        {k: v * float("nan") for k, v in content["model"].items()}
    ),
    "weights of texts": lambda content: content["model"].update(dict.fromkeys(content["model"], "x")),
    "weights by stride 0": _set("model", "visual.proj", torch.zeros(1).as_strided((50_000, 50_000), (0, 0))),
    "sparse weights": lambda content: _set("model", "visual.proj", content["model"]["visual.proj"].to_sparse())(
        content
    ),
    "meta weights": lambda content: _set("model", "visual.proj", content["model"]["visual.proj"].to("meta"))(content),
    "a config of 10^9 layers": _set("model_config", "vision_cfg", "layers", 10**9),
    "a config without towers": _set("model_config", "vision_cfg", None),
    "a config with an unknown key": _set("model_config", "more", 1),
    "a preprocessing of texts": _set("preprocess", "mean", "x"),
    "a preprocessing that is unknown": _set("preprocess", "resize_mode", "x"),
    "a preprocessing with more": _set("preprocess", "more", 1),
    "a preprocessing of a tensor": _set("preprocess", "size", torch.ones(3)),
    "a seed of a text": _set("random", {"seed": "x", "step": 2}),
    "learning of a text": _set("learning", {"visual.proj": "x"}),
}
HARMLESS = {
    *(
        "a key more",
        "maximize",
        "amsgrad",
        "fused and foreach",
        "a learning rate of NaN",
        "seconds of NaN",
        "a step below 0",
    ),
    *(
        "a progress of 10^18 steps",
        "a step that is true",
        "scaler is a list",
        "random is empty too",
        "a seed of a text",
    ),
    *("moments by stride 0", "transposed moments", "a best that is a text", "a preprocessing with more", "no data"),
    *("options is empty", "preprocess is empty", "state of parameters that are not there", "a NUL in a path"),
    *(
        "betas that are texts",
        "progress is empty too",
        "a progress with more",
        "a step of 10^400",
        "options of lists",
        "weights of integers",
    ),
    *("a vision model of a number", "a preprocessing of a tensor", "a step of NaN", "NaN moments"),
    *("half a surrogate pair in a path", "a batch size of 10^18", "a config with an unknown key"),
}


def _remote_code(folder: Path) -> list[object]:
    """A checkpoint whose config names a tokenizer folder with code."""
    (folder / "words").mkdir()
    _module(folder / "words", "own.py")
    (folder / "words" / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["own.Tok", None]}})
    )

    def change(content: dict[str, Any]) -> None:
        text = {"hf_tokenizer_name": str(folder / "words"), "tokenizer_kwargs": {"trust_remote_code": True}}
        content["model_config"]["text_cfg"].update(text)

    return _craft(change, "evaluate")(folder)


def _change_run(put: Callable[[Path, Path], Any]) -> Callable[[Path], list[object]]:
    """A case of a run that resumes after put(folder of the run, a file elsewhere)."""

    def make(folder: Path) -> list[object]:
        typed = _write_run(folder)
        put(folder / "logs" / "run", folder.parent / f"{folder.name}-{SECRET}")
        return typed

    return make


def _link(name: str, *, fresh: bool = False) -> Callable[[Path], list[object]]:
    """A case with a link to a file elsewhere in place of an output."""

    def put(place: Path, secret: Path) -> None:
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(secret)

    def make(folder: Path) -> list[object]:
        if not fresh:
            return _change_run(put)(folder)
        place = folder / "logs" / "run"
        place.mkdir(parents=True)
        put(place, folder.parent / f"{folder.name}-{SECRET}")
        return finetune(folder, *STEPS)

    return make


def _fifo_in_run(name: str) -> Callable[[Path], list[object]]:
    def put(place: Path, secret: Path) -> None:
        (place / name).unlink(missing_ok=True)
        os.mkfifo(place / name)

    return _change_run(put)


def _metrics(change: Callable[[bytes], bytes]) -> Callable[[Path], list[object]]:
    def put(place: Path, secret: Path) -> None:
        path = place / "metrics.jsonl"
        path.write_bytes(change(path.read_bytes()))

    return _change_run(put)


def _linked_tensorboard(folder: Path) -> list[object]:
    typed = _write_run(folder)
    elsewhere = folder.parent / f"{folder.name}-elsewhere"
    shutil.rmtree(elsewhere, ignore_errors=True)
    elsewhere.mkdir()
    (folder / "logs" / "run" / "tensorboard").symlink_to(elsewhere)
    return typed


LOGS: dict[str, Callable[[bytes], bytes]] = {
    "half a line": lambda lines: lines + b'{"kind": "tra',
    "a damaged line": lambda lines: lines.replace(b'"step": 1', b'"step": ,1'),
    "a line that is no record": lambda lines: b"[1]\n3}\n" + lines,
    "a record without a step": lambda lines: b'{"kind": "train"}\n' + lines,
    "a step that is a text": lambda lines: b'{"kind": "train", "step": "x"}\n' + lines,
    "no UTF-8": lambda lines: b'{"kind": "\xff"}\n' + lines,
    "zeros": lambda lines: lines + b"\0" * 4096,
    "nested 100,000 deep": lambda lines: b"[" * 100_000 + b"}\n" + lines,
    "5,000 digits": lambda lines: b'{"kind": "train", "step": ' + b"1" * 5000 + b"}\n" + lines,
}
LINKS = ("log.txt", "metrics.jsonl", "options.json", "results.json", "last.pt", "best.pt", ".writable", "tensorboard")
CHECKPOINTS = (
    *(
        Case(
            f"last.pt: {name}",
            _craft(change),
            EITHER if name in HARMLESS else "refused",
            words=() if name in HARMLESS else ("last.pt",),
        )
        for name, change in (*OPTIMIZER.items(), *PARTS.items())
    ),
    *(
        Case(f"last.pt, evaluated: {name}", _craft(PARTS[name], "evaluate"), EITHER if name in HARMLESS else "refused")
        for name in PARTS
        if name.split()[0] in ("model", "model_config", "preprocess", "options", "weights", "a", "no", "sparse", "meta")
        and not any(word in name for word in ("progress", "best", "step", "batch", "data", "seed"))
    ),
    Case("last.pt: a tokenizer with code", _remote_code),
    *(Case(f"run folder: metrics.jsonl with {name}", _metrics(change), VALID) for name, change in LOGS.items()),
    *(Case(f"run folder: {name} is a link, resumed", _link(name), EITHER) for name in LINKS if name != "last.pt"),
    *(Case(f"run folder: {name} is a link, fresh", _link(name, fresh=True), EITHER) for name in LINKS),
    *(
        Case(f"run folder: {name} is a FIFO", _fifo_in_run(name), EITHER)
        for name in LINKS
        if name not in ("tensorboard",)
    ),
    Case("run folder: tensorboard is a link to a folder", _linked_tensorboard, EITHER),
)
