"""Readers of weights, model configs, vocabularies, and the files of a resumed run."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.faults import tokens
from tests.faults.containers import change_safetensors, change_zip
from tests.faults.readers.reader import CAPTIONS, Reader, encoded_image, write_images
from tests.faults.structures import change_checkpoint, change_json
from tests.models.small import small_clip, small_preprocess

LEGACY = {"_use_new_zipfile_serialization": False}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "thing", "red", "##s", "红", "色")
VISION = {"layers": 1, "width": 16, "head_width": 16, "patch_size": 8, "image_size": 16}
TEXT = {"context_length": 8, "vocab_size": 60, "width": 8, "heads": 1, "layers": 1}
"""A model of a few kilobytes that is built in milliseconds and has no tokenizer."""
RUN_TEXT = TEXT | {"vocab_size": 49408, "width": 4}
"""The text tower of the smallest model for CLIP's tokenizer."""


def _clip(seed: int = 0) -> torch.nn.Module:
    return small_clip(seed=seed, embed_dim=8, vision_cfg=VISION, text_cfg=TEXT)


def _write_config(folder: Path, text: dict[str, Any] = TEXT) -> Path:
    path = folder / "model.json"
    path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": VISION, "text_cfg": text}))
    return path


def _save(layout: Callable[[dict], Any], name: str, **options: Any) -> Callable[[Path], list[Path]]:
    """Return a function that writes the weights of two models in a layout of torch.save."""

    def write(folder: Path) -> list[Path]:
        _write_config(folder)
        paths = [folder / f"{seed}{name}" for seed in (0, 1)]
        for seed, path in enumerate(paths):
            state = _clip(seed).state_dict()
            torch.save(layout({key: v.half() if seed else v for key, v in state.items()}), path, **options)
        return paths

    return write


def _open_clip(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    ours = {f"module.{name}": v for name, v in state.items()}
    return {"epoch": 3, "name": "run", "state_dict": ours, "optimizer": {"state": {}, "param_groups": []}}


def _ours(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    config = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}
    settings = {"model_config": config, "preprocess": small_preprocess(), "options": {"vision_model": "small"}}
    return {"model": state, **settings, "epoch": 1, "step": 2}


def _make_safetensors(folder: Path) -> list[Path]:
    from safetensors.torch import save_file

    _write_config(folder)
    paths = [folder / f"{seed}.safetensors" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        save_file({name: v.contiguous() for name, v in _clip(seed).state_dict().items()}, path)
    return paths


def _make_torchscript(folder: Path) -> list[Path]:
    """Write two archives in OpenAI's layout, one from tracing and one from scripting a holder of weights."""
    _write_config(folder)
    clip = copy.deepcopy(_clip())
    for name, value in {"input_resolution": 16, "context_length": 8, "vocab_size": 60}.items():
        clip.__dict__.pop(name, None)
        clip.register_buffer(name, torch.tensor(value))
    inputs = {"encode_image": torch.zeros(1, 3, 16, 16), "encode_text": torch.zeros(1, 8, dtype=torch.long)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace_module(clip, inputs, check_trace=False)
        scripted = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)))
        for name, module in (("traced.pt", traced), ("scripted.pt", scripted)):
            torch.jit.save(module, str(folder / name))
    return [folder / "traced.pt", folder / "scripted.pt"]


def _read_weights(path: Path) -> None:
    from clip_retrieval.models.build import build_model
    from clip_retrieval.options import ModelOptions

    config = path.with_name("model.json")
    built = build_model(ModelOptions(vision_model=str(config), pretrained=str(path)), typed_model=True)
    with torch.no_grad():
        built.clip.encode_image(torch.zeros(1, 3, 16, 16))


def _read_torchscript(path: Path) -> None:
    from clip_retrieval.models.weights import read_weights

    if path.name == "traced.pt":
        _read_weights(path)
    else:  # not a CLIP, but all of its tensors are read
        [tensor.sum() for tensor in read_weights(path).state.values()]


def _read_ours(path: Path) -> None:
    from clip_retrieval.models.build import build_model
    from clip_retrieval.models.checkpoint import Checkpoint
    from clip_retrieval.options import ModelOptions

    Checkpoint.load_if_ours(path)
    built = build_model(ModelOptions(pretrained=str(path)), typed_model=False)
    _use_model(built)


def _use_model(built: Any) -> None:
    """Preprocess an image and encode it."""
    import io

    from PIL import Image

    from clip_retrieval.data.pixels.pixels import ImageTransform

    image = Image.open(io.BytesIO(encoded_image(0))).convert("RGB")
    pixels = ImageTransform(built.preprocess)(image)[None].float()
    with torch.no_grad():
        built.clip.encode_image(pixels)


def _make_configs(folder: Path) -> list[Path]:
    write_images(folder, ["0.jpg"])
    vit = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": RUN_TEXT}
    wrapped = {"model_cfg": vit, "preprocess_cfg": small_preprocess()}
    resnet = vit | {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "image_size": 32}}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    bert = {"model_type": "bert", "vocab_size": len(WORDS), "max_position_embeddings": 16, **sizes}
    text = {"hf_model_name": "bert", "hf_config": bert, "context_length": 8, "hf_tokenizer_name": str(folder / "words")}
    hugging_face = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": text | {"hf_pooler_type": "mean_pooler"}}
    (folder / "words").mkdir()
    (folder / "words" / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    (folder / "words" / "config.json").write_text(json.dumps(bert))
    paths = []
    for name, config in (("vit", wrapped), ("resnet", resnet | {"custom_text": True}), ("bert", hugging_face)):
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(config))
    return paths


def _read_config(path: Path) -> None:
    from clip_retrieval.data.captions import tokenize
    from clip_retrieval.models.build import build_model
    from clip_retrieval.models.tokenizers import build_tokenizer
    from clip_retrieval.options import ModelOptions

    options = ModelOptions(vision_model=str(path), pretrained="none")
    built = build_model(options, typed_model=True)
    tokens = tokenize(CAPTIONS[:2], build_tokenizer(options, built))
    _use_model(built)
    with torch.no_grad():
        built.clip.encode_text(tokens.ids.long())


def _make_vocabulary(folder: Path) -> list[Path]:
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return [folder / "vocab.txt"]


def _read_vocabulary(path: Path) -> None:
    from clip_retrieval.data.captions import tokenize
    from clip_retrieval.models.tokenizers import WordPieceTokenizer

    tokenizer = WordPieceTokenizer(str(path), 8, len(WORDS))
    tokenize(CAPTIONS, tokenizer)
    WordPieceTokenizer(tokenizer.words, 8, len(WORDS))


def _make_tokenizer(folder: Path) -> list[Path]:
    from transformers import BertTokenizer

    saved = folder / "saved"
    BertTokenizer({word: number for number, word in enumerate(WORDS)}).save_pretrained(str(saved))
    (saved / "vocab.txt").unlink(missing_ok=True)
    (saved / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": len(WORDS)}))
    return sorted(saved.glob("*.json"))


def _read_tokenizer(path: Path) -> None:
    _read_vocabulary(path.parent)


def _make_bert(folder: Path) -> list[Path]:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    torch.save(BertModel(config).state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(config.to_json_string())
    return [folder / "pytorch_model.bin", folder / "config.json"]


def _read_bert(path: Path) -> None:
    from clip_retrieval.models.chinese_clip import bert_to_open_clip
    from clip_retrieval.models.weights import read_text_tower

    read_text_tower(str(path.parent), bert_to_open_clip, "BERT", {"num_attention_heads": 1})


@functools.cache
def _run_options(folder: Path) -> dict[str, Any]:
    """The options of a run of two steps in `folder`, which resumes before the last one."""
    data = {"dataset": "csv", "annotations": str(folder / "c.csv"), "vision_model": str(folder / "model.json")}
    length = {"epochs": 1, "batch_size": 3, "warmup": 1.0, "display": 1, "num_workers": 0}
    place = {"device": "cpu", "checkpoint_path": str(folder), "experiments": "run", "no_eval_first": True}
    return {**data, **length, **place, "resume": "auto", "save_every": 1}


def _make_run(folder: Path) -> list[Path]:
    """Write the folder of a run that was killed after the first of two steps; `before` has copies of its files."""
    from clip_retrieval.finetune import finetune
    from clip_retrieval.training.trainer import Trainer

    write_images(folder, [f"{i}.jpg" for i in range(4)])
    rows = [f"{i % 4}.jpg,{CAPTIONS[0]} {i},{'train' if i < 6 else 'val'}" for i in range(8)]
    (folder / "c.csv").write_text("image,caption,split\n" + "\n".join(rows) + "\n")
    _write_config(folder, RUN_TEXT)
    step = Trainer.step

    def stop(self: Trainer, batch: Any, at: int, rate: float) -> Any:
        if at == 2:
            raise SystemExit
        return step(self, batch, at, rate)

    Trainer.step = stop
    try:
        finetune({**_run_options(folder), "eval_steps": 1})
    except SystemExit:
        pass
    finally:
        Trainer.step = step
    shutil.copytree(folder / "run", folder / "before")
    return [folder / "run" / name for name in ("last.pt", "best.pt", "metrics.jsonl")]


def _one_of_run(number: int) -> Callable[[Path], list[Path]]:
    return lambda folder: _make_run(folder)[number : number + 1]


def _read_run(path: Path) -> None:
    """Resume a run; restore all of its files except `path` first."""
    from clip_retrieval.finetune import finetune

    folder = path.parents[1]
    for file in (folder / "run").iterdir():
        if file.is_dir():
            shutil.rmtree(file)
        elif file != path:
            file.unlink()
    for file in (folder / "before").iterdir():
        if file.is_file() and file.name != path.name:
            shutil.copyfile(file, folder / "run" / file.name)
    finetune({**_run_options(folder), "eval_steps": 1})


def _read_evaluated(path: Path) -> None:
    from clip_retrieval.evaluate import evaluate

    evaluate({"eval": True, "resume": str(path), "device": "cpu", "eval_split": "val", "num_workers": 0})


PICKLED = (*tokens.PICKLE, *tokens.ZIP)
SAVED = (change_zip, change_checkpoint)
MODELS = (
    Reader("torchscript archive", _make_torchscript, _read_torchscript, (*PICKLED, *tokens.CODE), (change_zip,)),
    Reader("open_clip .pt", _save(_open_clip, ".pt"), _read_weights, PICKLED, SAVED),
    Reader("legacy .pt", _save(dict, ".pt", **LEGACY), _read_weights, tokens.PICKLE, (change_checkpoint,)),
    Reader("safetensors", _make_safetensors, _read_weights, tokens.JSON, (change_safetensors,)),
    Reader("checkpoint of ours", _save(_ours, ".pt"), _read_ours, PICKLED, SAVED),
    Reader("last.pt, resumed", _one_of_run(0), _read_run, PICKLED, SAVED),
    Reader("best.pt, resumed", _one_of_run(1), _read_run, PICKLED, SAVED),
    Reader("best.pt, evaluated", _one_of_run(1), _read_evaluated, PICKLED, SAVED),
    Reader("metrics.jsonl, resumed", _one_of_run(2), _read_run, tokens.JSON, (change_json,)),
    Reader("model config", _make_configs, _read_config, tokens.JSON, (change_json,)),
    Reader("vocab.txt", _make_vocabulary, _read_vocabulary, tokens.LINES),
    Reader("tokenizer folder", _make_tokenizer, _read_tokenizer, tokens.JSON, (change_json,)),
    Reader("bert folder", _make_bert, _read_bert, (*PICKLED, *tokens.JSON), (*SAVED, change_json)),
)
