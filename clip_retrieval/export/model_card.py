"""The model card (README.md) of an exported model: its data, its options, its results, and how to load it."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from clip_retrieval import __version__
from clip_retrieval.api import ImageTextModel
from clip_retrieval.errors import UserError, one_line
from clip_retrieval.models.checkpoint import Checkpoint
from clip_retrieval.options import DataOptions, LossOptions, ModelOptions, TrainOptions
from clip_retrieval.reporting.results import read_results

COLUMNS = ("R@1", "R@5", "R@10", "MedR")
_SPECIAL = re.compile(r"[^\w .,:/@+\-=()%']|(?<![^\W_])_|_(?![^\W_])")
"""Characters that Markdown or HTML may give a meaning; an underscore within a word has none."""
LIBRARIES = {
    "open_clip": "open_clip",
    "transformers": "transformers",
    "onnx": "onnx",
    "chinese_clip": "pytorch",
    "peft": "peft",
}
USAGE = {
    "open_clip": """\
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")""",
    "transformers": """\
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER")
inputs = processor(images=images, text=texts, padding="max_length", truncation=True, return_tensors="pt")""",
    "onnx": """\
import onnxruntime

image = onnxruntime.InferenceSession("FOLDER/image.onnx")
text = onnxruntime.InferenceSession("FOLDER/text.onnx")
image_features = image.run(None, {"images": pixels})[0]  # uint8 (n, 3, height, width), resized as in preprocess.json
text_features = text.run(None, {"ids": ids})[0]  # int64 (n, context_length), padded""",
    "peft": """\
from peft import PeftModel
from transformers import AutoModel

model = PeftModel.from_pretrained(AutoModel.from_pretrained("BASE"), "FOLDER")  # BASE: see adapter_config.json""",
    "chinese_clip": """\
import torch

state_dict = torch.load("FILE.pt", weights_only=True)["state_dict"]  # Chinese-CLIP's own names""",
}


def model_card(checkpoint: Checkpoint, model: ImageTextModel, format: str, difference: float) -> str:
    """Return the text of README.md. Values from files are escaped; paths are cut to their last part."""
    parts = [
        f"---\nlibrary_name: {LIBRARIES[format]}\npipeline_tag: zero-shot-image-classification\n"
        "tags:\n- clip\n- image-text-retrieval\n---",
        f"# {_escape(model.name)}",
        f"Exported by clip_retrieval {__version__} after epoch {checkpoint.epoch:,}, step {checkpoint.step:,}. The "
        f"features of a few images and texts differ from the checkpoint's by at most {difference:.1g}.",
        "## Results",
        _results(checkpoint),
        "## Options",
        "Those that differ from the defaults.\n\n" + _table(("option", "value"), _options(checkpoint.options)),
        "## Preprocessing",
        _table(("", "value"), list(model.model.preprocess.items())),
        "## Use",
        f"```python\n{USAGE[format]}\n```",
    ]
    if prefix := checkpoint.options.get("caption_prefix"):
        parts.append(f"Every caption began with “{_escape(prefix)}”: put it before each text.")
    return "\n\n".join(parts) + "\n"


def _results(checkpoint: Checkpoint) -> str:
    """Return the table of the validation split and, if the run is complete, of the test split."""
    blocks = [checkpoint.val] if checkpoint.val else []
    blocks += _finished_run(checkpoint)
    rows = [
        (
            f"{block.get('dataset', '')} {block['split']}".strip(),
            {"i2t": "image to text", "t2i": "text to image"}[direction],
            *(f"{block[direction][name]:.2f}" for name in COLUMNS if name in block[direction]),
        )
        for block in blocks
        for direction in ("i2t", "t2i")
    ]
    return "Percent.\n\n" + _table(("data", "", *COLUMNS), rows) if rows else "Not measured."


def _finished_run(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return the results of the run's folder if they are those of this checkpoint: best.pt, or the only one."""
    folder = checkpoint.path.parent
    measured = "best.pt" if (folder / "best.pt").exists() else "last.pt"
    if checkpoint.path.name != measured:
        return []
    try:
        results = read_results(folder / "results.json")
    except (UserError, OSError):
        return []
    is_own = results.get("step") == checkpoint.step and "split" in results
    return [results] if is_own and results["split"] != (checkpoint.val or {}).get("split") else []


def _options(options: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the options of model, data, loss and training that differ from the defaults."""
    rows = []
    for group in (ModelOptions, DataOptions, LossOptions, TrainOptions):
        defaults = group()
        for field in dataclasses.fields(group):
            value = options.get(field.name)
            as_list = list(value) if isinstance(value, (list, tuple)) else [value]
            default = getattr(defaults, field.name)
            if (
                value is not None
                and value != default
                and as_list != list(default if isinstance(default, tuple) else ())
            ):
                rows.append((field.name, ", ".join(str(_without_folder(each)) for each in as_list)))
    return rows


def _without_folder(value: Any) -> Any:
    """Return the last part of an absolute path: a card may be published."""
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value  # noqa: PTH117


def _table(header: tuple[str, ...], rows: list[Any]) -> str:
    lines = [header, ("---",) * len(header), *(tuple(_escape(cell) for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(value: Any) -> str:
    """Escape a value so that Markdown and HTML show it as it is, on one line."""
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", one_line(str(value)))
