"""Model configs, vocabularies and tokenizer folders that run code, ask for too much, or lack something."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.hostile.case import EITHER, MARKER, Case, evaluate, model_config
from tests.faults.hostile.texts import DEEP, DIGITS
from tests.faults.readers.models import VISION, WORDS
from tests.models.small import small_preprocess

BERT = {"model_type": "bert", "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1}
BERT |= {"num_attention_heads": 1, "intermediate_size": 16, "max_position_embeddings": 16}
CODE = f'open("{{}}/{MARKER}-module", "w").close()\n'


def _config(change: Callable[[dict], Any]) -> Callable[[Path], list[object]]:
    """A case with a model config that `change` alters or replaces by another text."""

    def make(folder: Path) -> list[object]:
        config = model_config() | {"preprocess_cfg": small_preprocess()}
        wrapped = {"model_cfg": {key: config[key] for key in model_config()}, "preprocess_cfg": small_preprocess()}
        found = change(wrapped)
        text = found if isinstance(found, str) else json.dumps(wrapped)
        (folder / "bad.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        return evaluate(folder, "--vision_model", folder / "bad.json")

    return make


def _set(*path: Any) -> Callable[[dict], None]:
    """Set the value at a path of keys; the last argument is the value."""
    *keys, last, value = path

    def change(config: dict) -> None:
        for key in keys:
            config = config[key]
        config[last] = value

    return change


def _without(*path: str) -> Callable[[dict], None]:
    *keys, last = path

    def change(config: dict) -> None:
        for key in keys:
            config = config[key]
        del config[last]

    return change


MODEL, VISUAL, TEXT, IMAGES = (
    ("model_cfg",),
    ("model_cfg", "vision_cfg"),
    ("model_cfg", "text_cfg"),
    ("preprocess_cfg",),
)
CHANGES: dict[str, Callable[[dict], Any]] = {
    "no vision_cfg": _without(*VISUAL),
    "no text_cfg": _without(*TEXT),
    "no embed_dim": _without("model_cfg", "embed_dim"),
    "a list for vision_cfg": _set(*VISUAL, []),
    "a whole number as mean": _set(*IMAGES, "mean", 1),
    "a text as std": _set(*IMAGES, "std", "0.5"),
    "NaN as mean": _set(*IMAGES, "mean", [float("nan")] * 3),
    "zero as std": _set(*IMAGES, "std", [0, 0, 0]),
    "an unknown resize mode": _set(*IMAGES, "resize_mode", "x"),
    "an unknown interpolation": _set(*IMAGES, "interpolation", "x"),
    "an unknown colour mode": _set(*IMAGES, "mode", "x"),
    "a text as fill colour": _set(*IMAGES, "fill_color", "x"),
    "a fill colour of 2^70": _set(*IMAGES, "fill_color", 2**70),
    "a preprocessing of another kind": _set("preprocess_cfg", 3),
    "a patch larger than the image": _set(*VISUAL, "patch_size", 64),
    "a patch of no pixels": _set(*VISUAL, "patch_size", 0),
    "an image of 10^6 pixels": _set(*VISUAL, "image_size", 10**6),
    "an image of three sides": _set(*VISUAL, "image_size", [16, 16, 16]),
    "10^9 layers": _set(*VISUAL, "layers", 10**9),
    "10^400 layers": _set(*VISUAL, "layers", 10**400),
    "-1 layers": _set(*VISUAL, "layers", -1),
    "10^400 blocks": _set(*VISUAL, "layers", [1, 10**400, 1, 1]),
    "one block": _set(*VISUAL, "layers", [1]),
    "a width of 2^40": _set(*VISUAL, "width", 2**40),
    "a width of 0": _set(*VISUAL, "width", 0),
    "heads of 0": _set(*VISUAL, "head_width", 0),
    "10^9 text layers": _set(*TEXT, "layers", 10**9),
    "0 heads": _set(*TEXT, "heads", 0),
    "3 heads of 4 numbers": _set(*TEXT, "heads", 3),
    "a context of 10^12": _set(*TEXT, "context_length", 10**12),
    "a context of 0": _set(*TEXT, "context_length", 0),
    "a vocabulary of 10^12": _set(*TEXT, "vocab_size", 10**12),
    "a vocabulary of 0": _set(*TEXT, "vocab_size", 0),
    "an embedding of 10^12": _set("model_cfg", "embed_dim", 10**12),
    "an embedding of true": _set("model_cfg", "embed_dim", True),
    "an unknown key": _set(*VISUAL, "more", 1),
    "a timm model with code": _set(*VISUAL, "timm_model_name", "hf-hub:nobody/nothing"),
    "a timm model of a folder": _set(*VISUAL, "timm_model_name", "local-dir:/nowhere"),
    "a text tower of the hub": _set(*TEXT, "hf_model_name", "nobody/nothing"),
    "an unknown tokenizer argument": _set(*TEXT, "tokenizer_kwargs", {"x": 1}),
    "nested 100,000 deep": lambda config: DEEP,
    "5,000 digits": lambda config: f'{{"embed_dim": {DIGITS}}}',
    "half a surrogate pair": lambda config: '{"\\ud800": 1}',
    "a list": lambda config: "[]",
    "not UTF-8": lambda config: '{"a": "\udcff"}',
}
HARMLESS = (
    "a whole number as mean",
    "a text as fill colour",
    "a fill colour of 2^70",
    "an embedding of true",
    "3 heads of 4 numbers",
)


def _module(folder: Path, name: str) -> None:
    """Write a Python file that creates a marker when it is imported."""
    lines = f"{CODE.format(folder.parent)}from transformers import BertTokenizer, BertModel, BertConfig\n"
    lines += "class Tok(BertTokenizer):\n    pass\nclass Mod(BertModel):\n    pass\nclass Conf(BertConfig):\n    pass\n"
    (folder / name).write_text(lines)


def _words(folder: Path, **settings: Any) -> Path:
    """Write a tokenizer folder with code."""
    place = folder / "words"
    place.mkdir(exist_ok=True)
    _module(place, "own.py")
    (place / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    tokenizer = {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["own.Tok", None]}, **settings}
    (place / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    mapped = {"AutoConfig": "own.Conf", "AutoModel": "own.Mod", "AutoTokenizer": ["own.Tok", None]}
    (place / "config.json").write_text(json.dumps(BERT | {"model_type": "own", "auto_map": mapped}))
    return place


def _hugging_face(folder: Path, **text: Any) -> Path:
    """A model config with a BERT text tower and a tokenizer from a folder with code."""
    place = _words(folder)
    tower = {"hf_model_name": "bert", "hf_config": dict(BERT), "context_length": 8, "hf_tokenizer_name": str(place)}
    tower |= {"hf_pooler_type": "mean_pooler"} | text
    path = folder / "hf.json"
    path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": VISION, "text_cfg": tower}))
    return path


def _tower(**text: Any) -> Callable[[Path], list[object]]:
    return lambda folder: evaluate(folder, "--vision_model", _hugging_face(folder, **text))


def _remote_model(folder: Path) -> list[object]:
    """A text tower in a folder whose config.json maps to code."""
    path = _hugging_face(folder, hf_model_name=str(_words(folder)), hf_config={})
    return evaluate(folder, "--vision_model", path)


def _mapped_config(folder: Path) -> list[object]:
    mapped = {"AutoConfig": "own.Conf", "AutoModel": "own.Mod"}
    place = _words(folder)
    config = BERT | {"auto_map": mapped, "_name_or_path": str(place), "model_type": "own"}
    return evaluate(folder, "--vision_model", _hugging_face(folder, hf_config=config))


def _model_folder(folder: Path) -> list[object]:
    """A local-dir: with open_clip's config and a tokenizer with code."""
    place = _words(folder)
    config = json.loads(_hugging_face(folder).read_text())
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return evaluate(folder, "--vision_model", f"local-dir:{place}", "--pretrained", "none")


def _typed_tokenizer(folder: Path) -> list[object]:
    return evaluate(folder, "--vision_model", _hugging_face(folder), "--tokenizer", _words(folder))


def _vocabulary(words: list[str] | bytes, name: str = "vocab.txt") -> Callable[[Path], list[object]]:
    """A case with a vocabulary for a model with a small BERT text tower (simple-clip's kind)."""

    def make(folder: Path) -> list[object]:
        from tests.models.small import small_simple_config

        content = words if isinstance(words, bytes) else ("\n".join(words) + "\n").encode("utf-8", "surrogatepass")
        (folder / name).write_bytes(content)
        count = len(content.splitlines())
        (folder / "simple.json").write_text(json.dumps(small_simple_config(max(count, 6))))
        return evaluate(folder, "--vision_model", folder / "simple.json", "--tokenizer", folder / name)

    return make


def _fifo(option: str, name: str) -> Callable[[Path], list[object]]:
    def make(folder: Path) -> list[object]:
        os.mkfifo(folder / name)
        return evaluate(folder, option, folder / name)

    return make


LONG = [*WORDS, *(f"w{n}" for n in range(20))]
VOCABULARIES: dict[str, Any] = {
    "without [UNK]": ["[PAD]", "x", "[CLS]", "[SEP]", "[MASK]", *LONG[5:]],
    "without [CLS] and [SEP]": ["[PAD]", "[UNK]", *LONG[5:]],
    "without [PAD]": LONG[1:],
    "each word twice": [*LONG, *LONG],
    "nothing": [],
    "half a surrogate pair": [*LONG, "\ud800"],
    "not UTF-8": b"\n".join(word.encode() for word in LONG) + b"\n\xff\xfe\n",
    "NUL": [*LONG, "a\0b"],
    "one line of a megabyte": ["a" * 1_000_000],
}
TOKENIZERS = (
    Case("tokenizer folder: auto_map", _tower(), EITHER),
    Case("tokenizer folder: auto_map, typed", _typed_tokenizer, EITHER),
    Case("tokenizer_kwargs: trust_remote_code", _tower(tokenizer_kwargs={"trust_remote_code": True})),
    Case("tokenizer_kwargs: a module", _tower(tokenizer_kwargs={"tokenizer_type": "own", "use_fast": False}), EITHER),
    Case("text tower: a folder with code", _remote_model, EITHER),
    Case("text tower: hf_config with auto_map", _mapped_config, EITHER),
    Case("local-dir: with code", _model_folder, EITHER),
    Case("hf_config: trust_remote_code", _tower(hf_config={**BERT, "trust_remote_code": True}), EITHER),
    Case("hf_config: 10^9 layers", _tower(hf_config={**BERT, "num_hidden_layers": 10**9})),
    Case("hf_config: a vocabulary of 10^12", _tower(hf_config={**BERT, "vocab_size": 10**12})),
    Case("hf_config: a context of 10^12", _tower(hf_config={**BERT, "max_position_embeddings": 10**12})),
    Case("hf_config: an unknown model", _tower(hf_config={**BERT, "model_type": "own"})),
    Case("hf_config: torch_dtype of code", _tower(hf_config={**BERT, "torch_dtype": "__import__"})),
    *(
        Case(
            f"vocabulary: {name}",
            _vocabulary(words),
            EITHER if name in ("NUL", "each word twice") else "refused",
            words=("vocab.txt",),
        )
        for name, words in VOCABULARIES.items()
    ),
)
MODELS = (
    *(
        Case(f"model config: {name}", _config(change), EITHER if name in HARMLESS else "refused", words=("bad.json",))
        for name, change in CHANGES.items()
    ),
    *TOKENIZERS,
    Case("model config: a FIFO", _fifo("--vision_model", "m.json")),
    Case("vocabulary: a FIFO", _fifo("--tokenizer", "vocab.txt")),
    Case("captions: a FIFO", _fifo("--annotations", "c.csv")),
    Case("config: a FIFO", _fifo("--config", "run.yaml")),
)
