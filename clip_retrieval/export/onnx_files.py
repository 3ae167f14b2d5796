"""ONNX files of both towers: resized pixels and token ids in, L2-normalised features out."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path

import torch
from torch import Tensor, nn

from clip_retrieval.api import ImageTextModel
from clip_retrieval.errors import UserError
from clip_retrieval.export.sample import Exported, Sample
from clip_retrieval.export.tokenizer_files import to_transformers
from clip_retrieval.files import write_json
from clip_retrieval.models.image_size import height_and_width
from clip_retrieval.models.libraries import quiet, translate_errors
from clip_retrieval.models.towers import RetrievalModel

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST = 2**31 - 2**27
"""Bytes of weights in a .onnx file, which is limited to 2 GiB; more are written to a file beside it."""


class _Tower(nn.Module):
    def __init__(self, model: RetrievalModel, encode: str):
        super().__init__()
        self.model: RetrievalModel = model
        self._encode = encode

    def forward(self, inputs: Tensor) -> Tensor:
        return getattr(self.model, self._encode)(inputs)


def write(model: ImageTextModel, folder: Path) -> None:
    """Write image.onnx, text.onnx, preprocess.json and the tokenizer's files."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install {' '.join(PACKAGES)}")
    images = torch.zeros(2, 3, *height_and_width(model.model.preprocess["size"]), dtype=torch.uint8)
    ids = model.tokenizer(["a", "b"]).long()
    _export(_Tower(model.model, "encode_image"), images, "images", folder / "image.onnx", model.name)
    _export(_Tower(model.model, "encode_text"), ids, "ids", folder / "text.onnx", model.name)
    write_json(folder / "preprocess.json", model.model.preprocess)
    to_transformers(model.tokenizer).save_pretrained(folder)


def _export(tower: nn.Module, example: Tensor, name: str, path: Path, model_name: str) -> None:
    size = sum(parameter.nbytes for parameter in tower.parameters())
    with (
        translate_errors(f"{model_name} cannot be exported to {path.name}", "choose another --format"),
        contextlib.redirect_stdout(io.StringIO()),
        torch.no_grad(),
    ):
        torch.onnx.export(
            tower.eval(),
            (example,),
            path,
            input_names=[name],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=size > LARGEST,
            verbose=False,
        )


def read(folder: Path, sample: Sample) -> Exported:
    """Compute the features with onnxruntime, in batches of another size than at the export."""
    import onnxruntime

    with quiet():
        features = []
        for name, inputs in (("image", sample.resized), ("text", sample.tokens.ids)):
            session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
            key = session.get_inputs()[0].name
            parts = [session.run(None, {key: part.numpy()})[0] for part in (inputs[:1], inputs[1:])]
            features.append(torch.cat([torch.from_numpy(part) for part in parts]))
    return Exported(*features)
