"""Export a checkpoint to the files of another system, checked numerically against the model.

python scripts/export.py logs/ex0/best.pt OUT --format open_clip
"""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import Any

from clip_retrieval.api import load_model
from clip_retrieval.errors import UserError
from clip_retrieval.export.model_card import model_card
from clip_retrieval.export.sample import compare, make_sample
from clip_retrieval.files import write_text
from clip_retrieval.models.checkpoint import Checkpoint
from clip_retrieval.models.libraries import translate_errors
from clip_retrieval.run.folder import make_folder

FORMATS = {
    "open_clip": "open_clip_folder",
    "transformers": "transformers_folder",
    "chinese_clip": "chinese_clip_file",
    "onnx": "onnx_files",
    "peft": "peft_folder",
}
"""Module of each format: `write(model, folder)`, for peft also with the checkpoint, and `read(folder, sample)`, which
returns the exported features."""

CARD = "README.md"


def export(checkpoint: Path, output: Path, format: str, **options: Any) -> float:
    """Export a checkpoint of ours. The output appears when it is complete and checked.

    Args:
        checkpoint: a best.pt or last.pt.
        output: folder to make; for chinese_clip a file, with the model card beside it (`clip_cn.md`).
        format: one of FORMATS.
        options: see `api.load_model`.

    Returns the largest difference of the features (L2-normalised) of a few random images and texts.
    Raises UserError if the output exists, or the format cannot hold the model; then nothing is written.
    """
    files: Any = importlib.import_module(f"clip_retrieval.export.{FORMATS[format]}")
    if hasattr(files, "WEIGHTS_FILE") and output.suffix == ".md":
        raise UserError(f"{output}: the model card has this name; choose one that ends in .pt")
    for path in (output, output.with_suffix(".md")) if hasattr(files, "WEIGHTS_FILE") else (output,):
        if os.path.lexists(path):
            raise UserError(f"{path} already exists; choose another name, or delete it")
    source = Checkpoint.load(checkpoint)
    model = load_model(checkpoint, "cpu", **options)
    if model.model.adaptor is not None and format != "onnx":
        raise UserError(f"{checkpoint} has an adaptor, which --format {format} cannot hold; use --format onnx")

    # write to a temporary folder, read it back with the other system, and compare
    make_folder(output.absolute().parent, "OUT")
    folder = output.absolute().with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        files.write(model, folder, *([source] if format == "peft" else []))
        sample = make_sample(model)
        with translate_errors(f"{checkpoint}: {format} cannot read the exported files", "choose another --format"):
            exported = files.read(folder, sample)
        difference = compare(sample, exported, str(checkpoint))
        write_text(folder / CARD, model_card(source, model, format, difference))
        _move(files, folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return difference


def _move(files: Any, folder: Path, output: Path) -> None:
    if hasattr(files, "WEIGHTS_FILE"):
        (folder / CARD).replace(output.with_suffix(".md"))
        (folder / files.WEIGHTS_FILE).replace(output)
        return
    if hasattr(files, "relocate"):
        files.relocate(folder, output)
    folder.rename(output)
