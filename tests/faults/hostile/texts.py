"""Captions, tables, configs and features: JSON, CSV, YAML, NPY, text."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.hostile.case import EITHER, MARKER, VALID, Case, evaluate, finetune, write_data, write_model
from tests.faults.readers.reader import write_images

DIGITS = "1" * 5000  # more than int() accepts
DEEP = "[" * 100_000
FEATURES = "scripts/evaluate_features.py"
PREDICTIONS = "scripts/evaluate_predictions.py"


def _file(name: str, content: bytes | str | Callable[[], bytes], *typed: object) -> Callable[[Path], list[object]]:
    """A case with one hostile file; FILE in `typed` is replaced by its path."""

    def make(folder: Path) -> list[object]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        found = content() if callable(content) else content
        path.write_bytes(found if isinstance(found, bytes) else found.encode("utf-8", "surrogatepass"))
        return evaluate(folder, *(path if word == "FILE" else word for word in typed))

    return make


def _coco(name: str, content: Any, **options: Any) -> Case:
    text = content if isinstance(content, str) else json.dumps(content)
    make = _file("own.json", text, "--dataset", "coco", "--annotations", "FILE")
    return Case(f"coco: {name}", make, **({"words": ("own.json",)} | options))


def _coco_with(image_id: Any = 1, annotation_id: Any = 1, caption: Any = "a dog", file_name: Any = "0.jpg") -> dict:
    annotations = [{"id": annotation_id, "image_id": image_id, "caption": caption}]
    return {"images": [{"id": image_id, "file_name": file_name}], "annotations": annotations}


def _karpathy(name: str, text: str, **options: Any) -> Case:
    make = _file("dataset_own.json", text, "--dataset", "karpathy", "--annotations", "FILE")
    return Case(f"karpathy: {name}", make, **({"words": ("dataset_own.json",)} | options))


def _karpathy_with(filename: str = '"0.jpg"', raw: str = '"a dog"', split: str = '"test"') -> str:
    sentence = f'{{"raw": {raw}}}'
    return f'{{"images": [{{"filename": {filename}, "split": {split}, "sentences": [{sentence}]}}]}}'


def _csv(name: str, content: bytes, **options: Any) -> Case:
    make = _file("own.csv", content, "--dataset", "csv", "--annotations", "FILE")
    return Case(f"csv: {name}", make, **({"words": ("own.csv",)} | options))


def _config(name: str, content: bytes | str, **options: Any) -> Case:
    make = _file("run.yaml", content, "--config", "FILE")
    return Case(f"config: {name}", make, **({"words": ("run.yaml",)} | options))


def _chinese(name: str, text: str, **options: Any) -> Case:
    import base64

    from tests.faults.readers.reader import encoded_image

    def make(folder: Path) -> list[object]:
        image = base64.b64encode(encoded_image(0)).decode()
        (folder / "test_imgs.tsv").write_text(f"1\t{image}\n")
        (folder / "test_texts.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
        return evaluate(folder, "--dataset", "chinese", "--dataset_root", folder, "--annotations", None)

    return Case(f"chinese texts: {name}", make, **({"words": ("test_texts.jsonl",)} | options))


def _gzip_bomb(name: str, reader: str) -> Case:
    """A gzip bomb: ten gigabytes of blanks in ten megabytes, in several members."""
    make = _file(name, lambda: gzip.compress(b" " * 100_000_000, 1) * 100, "--dataset", reader, "--annotations", "FILE")
    return Case(f"gzip bomb: {name}", make, words=(name,))


def npy(header: str, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    """An .npy file with any header."""
    text = header.encode() + b"\n"
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(text))
    return b"\x93NUMPY" + version + size + text + data


def header(shape: str = "(3,)", descr: str = "'<i8'", order: str = "False") -> str:
    """The text of an .npy header."""
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


NPY_FILES: dict[str, bytes] = {
    "10^12 numbers": npy(header("(1000000000000,)")),
    "10^12 numbers in rows": npy(header("(1000000, 1000000)", "'<f4'")),
    "a size beyond 64 bit": npy(header("(4294967296, 4294967296)")),
    "a negative size": npy(header("(-1,)")),
    "a broken header": npy("{'descr': '<i8', 'fortran_order': False, 'shape': (3,"),
    "an open string": npy("{'descr': '<i8"),
    "a header of brackets": npy("(" * 5000),
    "a header that is code": npy(f"__import__('os').mkdir('{MARKER}')"),
    "pickled objects": b"\x93NUMPY\1\0"
    + struct.pack("<H", 60)
    + header("(1,)", "'|O'").ljust(59).encode()
    + b"\n"
    + pickle.dumps([1]),
    "a header of 4 GB": b"\x93NUMPY\2\0\xff\xff\xff\xff{",
    "a structure": npy(header("(3,)", "[('a', '<i4')]"), b"\0" * 12),
    "5,000 digits": npy(header(f"({DIGITS},)")),
    "empty": b"",
}


def _ids(name: str, content: bytes) -> Case:
    def make(folder: Path) -> list[object]:
        for part in ("train2014", "val2014"):
            path = folder / "annotations" / f"captions_{part}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(_coco_with()))
        (folder / "annotations" / "coco_test_ids.npy").write_bytes(content)
        return evaluate(folder, "--dataset", "coco", "--dataset_root", folder, "--annotations", None)

    return Case(f"coco ids: {name}", make, words=("coco_test_ids.npy",))


def _features(name: str, content: bytes) -> Case:
    def make(folder: Path) -> list[object]:
        (folder / "image.npy").write_bytes(content)
        np.save(folder / "text.npy", np.ones((3, 4), np.float32))
        np.save(folder / "pairs.npy", np.array([[0, 0]]))
        sides = ["--image_features", folder / "image.npy", "--text_features", folder / "text.npy"]
        return [*sides, "--pairs", folder / "pairs.npy", "--results", folder / "results.json"]

    return Case(f"features: {name}", make, script=FEATURES, words=("image.npy",))


def _ranks(name: str, content: bytes) -> Case:
    def make(folder: Path) -> list[object]:
        with zipfile.ZipFile(folder / "ranks.npz", "w") as file:
            file.writestr("i2t_above.npy", content)
        return [folder / "ranks.npz", folder / "ranks.npz"]

    return Case(f"ranks: {name}", make, script="scripts/compare.py", words=("ranks.npz",))


def _predictions(name: str, gold: str, predictions: str, bad: str) -> Case:
    def make(folder: Path) -> list[object]:
        for file, text in (("gold.jsonl", gold), ("predictions.jsonl", predictions)):
            (folder / file).write_bytes(text.encode("utf-8", "surrogatepass"))
        return [folder / "gold.jsonl", folder / "predictions.jsonl", folder / "scores.json"]

    return Case(f"predictions: {name}", make, script=PREDICTIONS, words=(bad,))


def _yaml_laughs() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefghi", "bcdefghij")]
    return "\n".join(lines)


def _results(name: str, text: str) -> Case:
    def make(folder: Path) -> list[object]:
        (folder / "results.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        return [folder / "results.json"]

    return Case(f"results table: {name}", make, script="scripts/results_table.py", words=("results.json",))


def _class_file(name: str, file: str, text: str | bytes) -> Case:
    def make(folder: Path) -> list[object]:
        write_images(folder / "images", ["dog/0.jpg", "cat/1.jpg"])
        (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        zero_shot = ["--zero_shot_eval", folder / "images", "--zero_shot_class_names", folder / file]
        return finetune(folder, *zero_shot)

    return Case(f"class names: {name}", make, words=(file,))


def _nul_in_config(folder: Path) -> list[object]:
    path = folder / "run.yaml"
    path.write_text('train_data: "a\\0b*"\n')
    write_data(folder), write_model(folder)
    return ["--config", path, "--checkpoint_path", folder / "logs"]


def _surrogate_option(folder: Path) -> list[object]:
    """A case with a name that is not UTF-8."""
    return evaluate(folder, "--annotations", os.fsencode(folder / "captions") + b"\xff\xfe.csv")


COCO = (
    _coco("ids of 2^63", _coco_with(2**63, 2**63), wanted=EITHER),
    _coco("ids of 2^64", _coco_with(2**64 + 1, 10**30), wanted=EITHER),
    _coco("negative ids", _coco_with(-(2**70), -1), wanted=EITHER),
    _coco("an id of 5,000 digits", json.dumps(_coco_with()).replace('"id": 1', f'"id": {DIGITS}')),
    _coco("true as an id", _coco_with(True, True), wanted=EITHER),
    _coco("NaN as an id", json.dumps(_coco_with()).replace('"id": 1', '"id": NaN')),
    _coco("nested 100,000 deep", DEEP),
    _coco("a NUL in a file name", _coco_with(file_name="a\0b.jpg")),
    _coco("half a surrogate pair in a file name", _coco_with(file_name="\ud800/a.jpg")),
    _coco("half a surrogate pair in a caption", _coco_with(caption="half an emoji \ud83d"), wanted=VALID),
    _coco("a file name of 10,000 characters", _coco_with(file_name="a" * 10_000)),
    _coco("a file name with line breaks", _coco_with(file_name="a\nerror: b\r\x1b[2J.jpg")),
    _coco("UTF-16", json.dumps(_coco_with()).encode("utf-16").decode("latin-1")),
)
KARPATHY = (
    _karpathy("5,000 digits", f'{{"images": {DIGITS}}}'),
    _karpathy("nested 100,000 deep", '{"images": ' + DEEP),
    _karpathy("half a surrogate pair in a file name", _karpathy_with(filename='"\\ud800/a.jpg"')),
    _karpathy("half a surrogate pair in a caption", _karpathy_with(raw='"half \\udc00 emoji"'), wanted=VALID),
    _karpathy("a NUL in a file name", _karpathy_with(filename='"a\\u0000.jpg"')),
    _karpathy("a list as split", _karpathy_with(split="[1]")),
)
CSV = (
    _csv("a NUL in a folder", b"image,caption\n0.jpg,x\nsub\0dir/a.jpg,x\n"),
    _csv("a NUL in a file name", b"image,caption\na\0.jpg,x\n"),
    _csv("no UTF-8", b"image,caption\n\xff\xfe.jpg,x\n"),
    _csv("a cell of a megabyte", b"image,caption\n0.jpg," + b"a" * 1_000_000 + b"\n", wanted=EITHER),
    _csv("a quote that is not closed", b'image,caption\n0.jpg,"' + b"a\n" * 100_000),
    _csv("a million columns", b"image,caption" + b"," * 1_000_000 + b"\n0.jpg,x\n"),
    _csv("a name of 10,000 characters", b"image,caption\n" + b"a" * 10_000 + b".jpg,x\n"),
    Case("an option that is not UTF-8", _surrogate_option),
)
CONFIGS = (
    _config("60,000 keys", "\n".join(f"key_{n}: 1" for n in range(60_000))),
    _config("60,000 keys in a mapping", "a:\n" + "\n".join(f"  key_{n}: 1" for n in range(60_000))),
    _config("a billion laughs", _yaml_laughs()),
    _config("a tag that runs code", f"vision_model: !!python/object/apply:os.mkdir ['{MARKER}']", wanted=EITHER),
    _config("nested 100,000 deep", DEEP),
    _config("an alias of itself", "a: &a [*a]"),
    _config("a merge of itself", "a: &a\n  <<: *a\n"),
    _config("not UTF-8", b"lr: \xff\xfe"),
    _config("5,000 digits", f"batch_size: {DIGITS}"),
    _config("an infinite number", "lr: .inf"),
    Case("config: a NUL in a path", _nul_in_config),
)
CHINESE = (
    _chinese("5,000 digits", f'{{"text_id": {DIGITS}, "text": "x", "image_ids": [1]}}\n'),
    _chinese("an image id of 5,000 digits", f'{{"text_id": 1, "text": "x", "image_ids": [{DIGITS}]}}\n'),
    _chinese("a text of 5,000 digits", f'{{"text_id": 1, "text": {DIGITS}, "image_ids": [1]}}\n'),
    _chinese("nested 100,000 deep", f'{{"text_id": 1, "text": "x", "image_ids": {DEEP}\n'),
    _chinese("half a surrogate pair", '{"text_id": 1, "text": "half \\ud83d", "image_ids": [1]}\n', wanted=VALID),
    _chinese("an infinite number as text", '{"text_id": 1, "text": 1e999, "image_ids": [1]}\n', wanted=EITHER),
)
ARRAYS = (
    *(_ids(name, content) for name, content in NPY_FILES.items()),
    *(_features(name, content) for name, content in NPY_FILES.items()),
    *(_ranks(name, content) for name, content in NPY_FILES.items()),
)
LINES = (
    _predictions(
        "5,000 digits", '{"text_id": 1, "image_ids": [1]}', f'{{"text_id": {DIGITS}, "image_ids": [1]}}', "predi"
    ),
    _predictions(
        "nested 100,000 deep", f'{{"text_id": 1, "image_ids": {DEEP}', '{"text_id": 1, "image_ids": [1]}', "gold"
    ),
    _predictions("infinite", '{"text_id": 1, "image_ids": [1]}', '{"text_id": 1, "image_ids": [1e999]}', "predictions"),
    _results("nested 100,000 deep", DEEP),
    _results("5,000 digits", f'{{"i2t": {{"R@1": {DIGITS}}}, "t2i": {{"R@1": 1}}}}'),
    _results("texts for numbers", '{"i2t": {"R@1": "a"}, "t2i": {"R@1": "b"}}'),
    _class_file("5,000 digits", "names.json", f"[{DIGITS}]"),
    _class_file("nested 100,000 deep", "names.json", DEEP),
    _class_file("not UTF-8", "names.txt", b"dog\xff\ncat\n"),
)


BOMBS = (_gzip_bomb("dataset_own.json.gz", "karpathy"), _gzip_bomb("own.csv.gz", "csv"))
TEXTS = (*COCO, *KARPATHY, *CSV, *CONFIGS, *CHINESE, *ARRAYS, *LINES, *BOMBS)
