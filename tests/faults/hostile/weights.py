"""Weight files that run code, need too much memory, or hold tensors that cannot be copied into a model."""

from __future__ import annotations

import functools
import json
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.faults.containers import write_zip
from tests.faults.hostile.case import EITHER, VALID, Case, evaluate, finetune, model_config
from tests.faults.hostile.packed import PAIRS, Runs
from tests.faults.hostile.torchscript import SCRIPTS
from tests.models.small import small_clip

Write = Callable[[Path], Any]
State = dict[str, Any]


@functools.cache
def _state() -> State:
    return small_clip(**model_config()).state_dict()


def _write_with_torch(content: Callable[[], Any], **options: Any) -> Write:
    def write(path: Path) -> None:
        torch.save(content(), path, **options)

    return write


def _change_tensor(change: Callable[[torch.Tensor], Any], name: str = "visual.proj") -> Callable[[], State]:
    """The weights of a model with one of them changed."""
    return lambda: {**_state(), name: change(_state()[name])}


def _change_all_tensors(change: Callable[[torch.Tensor], Any]) -> Callable[[], State]:
    return lambda: {name: change(tensor) for name, tensor in _state().items()}


def _without_warnings(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same, without torch's warnings about new or deprecated kinds of tensors."""

    def change_silently(tensor: torch.Tensor) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return change(tensor)

    return change_silently


def _set_last_element(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


TENSORS: dict[str, Callable[[], State]] = {
    "one meta tensor": _change_tensor(lambda t: t.to("meta")),
    "all meta tensors": _change_all_tensors(lambda t: t.to("meta")),
    "a sparse tensor": _change_tensor(lambda t: t.to_sparse()),
    "a sparse tensor in rows": _change_tensor(_without_warnings(lambda t: t.to_sparse_csr())),
    "a quantised tensor": _change_tensor(
        _without_warnings(lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8))
    ),
    "a nested tensor": _change_tensor(_without_warnings(lambda t: torch.nested.nested_tensor([t, t]))),
    "complex numbers": _change_tensor(lambda t: t.to(torch.complex64)),
    "a text for a tensor": _change_tensor(lambda t: "text"),
    "NaN": _change_tensor(_set_last_element(float("nan"))),
    "infinity": _change_tensor(_set_last_element(float("inf")), "transformer.resblocks.0.ln_1.bias"),
    "NaN as the scale": _change_tensor(lambda t: torch.tensor(float("nan")), "logit_scale"),
    "float64 beyond float32": _change_tensor(lambda t: torch.full_like(t, 1e300, dtype=torch.float64)),
    "a tensor of 10 GB by stride 0": _change_tensor(lambda t: torch.zeros(1).as_strided((50_000, 50_000), (0, 0))),
    "a row of 10^12 by stride 0": _change_tensor(lambda t: torch.zeros(1).as_strided((10**12,), (0,)), "logit_scale"),
    "another shape": _change_tensor(lambda t: t[:1]),
    "no shape": _change_tensor(lambda t: torch.tensor(1.0)),
    "no elements": _change_tensor(lambda t: t[:0]),
    "a tensor more": lambda: {**_state(), "more": torch.zeros(2)},
    "half a surrogate pair as a name": lambda: {**_state(), "\ud800": torch.zeros(2)},
    "a name of a megabyte": lambda: {**_state(), "a" * 1_000_000: torch.zeros(2)},
    "nothing but numbers": lambda: {"state_dict": {"a": 1}},
    "a list": lambda: [1, 2, 3],
}
FINE: dict[str, Callable[[], State]] = {
    "a number as a name": lambda: {**_state(), 3: torch.zeros(2)},
    "float16": _change_all_tensors(lambda t: t.half() if t.is_floating_point() else t),
    "float64": _change_all_tensors(lambda t: t.double() if t.is_floating_point() else t),
    "parameters": _change_all_tensors(lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point())),
    "tensors that overlap": lambda: {
        name: t.clone().T.contiguous().T if t.ndim == 2 else t for name, t in _state().items()
    },
}


def _write_pickle(content: bytes) -> Write:
    """A bare pickle, the format of torch.save before version 1.6."""
    return lambda path: path.write_bytes(content)


def _write_archive(content: bytes, *, records: dict[str, bytes] | None = None) -> Write:
    """A pickle as the data.pkl of a zip of torch.save."""
    entries = [("archive/data.pkl", content), ("archive/version", b"3\n"), ("archive/byteorder", b"little")]
    entries += [(f"archive/data/{name}", data) for name, data in (records or {}).items()]
    return lambda path: path.write_bytes(write_zip(entries))


def _write_deflated(path: Path) -> None:
    """A gigabyte of zeros in a megabyte: a compressed entry, which torch never writes."""
    _write_with_torch(_state)(path)
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    block = b"\0" * 10_000_000
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive:
        for name, content in entries:
            if name.endswith("/data/0"):
                with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as entry:
                    entry._compressor = zlib.compressobj(1, zlib.DEFLATED, -15)
                    for _ in range(100):
                        entry.write(block)
            else:
                archive.writestr(name, content)


def _write_claim(size: int) -> Write:
    """A zip whose directory claims this size for the first tensor."""

    def write(path: Path) -> None:
        _write_with_torch(_state)(path)
        content = path.read_bytes()
        begin = content.rindex(b"PK\1\2", 0, content.rindex(b"/data/0"))
        path.write_bytes(content[: begin + 20] + struct.pack("<II", size, size) + content[begin + 28 :])

    return write


def _write_huge_tensor(path: Path) -> None:
    """The pickle of a tensor that has more elements than its record."""
    storage = "((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + "0X\3\0\0\0cpuJ\0\0\0\x7ftQ"
    body = (
        f"ctorch._utils\n_rebuild_tensor_v2\n({storage[1:]}K\0(J\0\0\0\x7ftK\1\x85\x89ccollections\nOrderedDict\n)RtR."
    )
    _write_archive(b"\x80\2" + body.encode("latin-1"), records={"0": b"\0" * 16})(path)


def _safetensors(header: Any, data: bytes = b"", size: int | None = None) -> Write:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda path: path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


def _entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


def _safe_state(change: Callable[[torch.Tensor], torch.Tensor]) -> Write:
    def write(path: Path) -> None:
        from safetensors.torch import save_file

        save_file({name: change(t).contiguous() for name, t in _state().items()}, path)

    return write


FILES: dict[str, tuple[str, Write]] = {
    "code in a checkpoint": ("w.pt", _write_with_torch(lambda: {"state_dict": Runs()})),
    "code in a legacy checkpoint": ("w.pt", _write_with_torch(lambda: Runs(), _use_new_zipfile_serialization=False)),
    "code in a bare pickle": ("w.pt", _write_pickle(pickle.dumps(Runs()))),
    "code in a .bin": ("w.bin", _write_pickle(pickle.dumps({"state_dict": Runs()}))),
    "deflated entries": ("w.pt", _write_deflated),
    "an entry of 4 GB in the directory": ("w.pt", _write_claim(2**32 - 2)),
    "a storage shorter than its tensor": ("w.pt", _write_huge_tensor),
    "a legacy file of 10 bytes": ("w.pt", _write_pickle(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")),
    **{f"pickle: {name}": ("w.pt", _write_pickle(content)) for name, content in PAIRS.items()},
    **{f"pickle in a zip: {name}": ("w.pt", _write_archive(content)) for name, content in PAIRS.items() if content},
    "safetensors: a header of 2^63 bytes": ("w.safetensors", _safetensors(b"{}", size=2**63)),
    "safetensors: nested 100,000 deep": ("w.safetensors", _safetensors(b'{"a":' + b"[" * 100_000)),
    "safetensors: 10^12 numbers": ("w.safetensors", _safetensors(_entry([10**12], 0, 4 * 10**12))),
    "safetensors: offsets that overlap": (
        "w.safetensors",
        _safetensors(_entry([2], 0, 8) | {"b": _entry([2], 4, 12)["a"]}, b"\0" * 12),
    ),
    "safetensors: a negative shape": ("w.safetensors", _safetensors(_entry([-1], 0, 4), b"\0" * 4)),
    "safetensors: an unknown type": ("w.safetensors", _safetensors(_entry([1], 0, 4, "F99"), b"\0" * 4)),
    "safetensors: NaN": ("w.safetensors", _safe_state(_set_last_element(float("nan")))),
    "a zip of nothing": ("w.pt", lambda path: path.write_bytes(b"PK\5\6" + b"\0" * 18)),
    "a text": ("w.pt", lambda path: path.write_bytes(b"<!DOCTYPE html><html></html>")),
}


def _make_case(name: str, write: Write, program: Callable[..., list[object]] = evaluate, option: str = "--pretrained"):
    def make(folder: Path) -> list[object]:
        write(folder / name)
        return program(folder, option, folder / name)

    return make


def _weights(name: str, make: Callable, **options: Any) -> Case:
    return Case(f"weights: {name}", make, **options)


WEIGHTS = (
    *(
        _weights(name, _make_case("w.pt", _write_with_torch(content)), words=("w.pt",))
        for name, content in TENSORS.items()
    ),
    *(
        _weights(f"{name}, to train", _make_case("w.pt", _write_with_torch(TENSORS[name]), finetune), words=("w.pt",))
        for name in ("NaN", "infinity", "all meta tensors", "a sparse tensor", "a quantised tensor")
    ),
    *(_weights(name, _make_case("w.pt", _write_with_torch(content)), wanted=VALID) for name, content in FINE.items()),
    *(_weights(name, _make_case(file, write), words=(file,)) for name, (file, write) in FILES.items()),
    *(_weights(f"TorchScript, {name}", _make_case("w.pt", write), words=("w.pt",)) for name, write in SCRIPTS.items()),
    *(
        _weights(
            f"TorchScript, {name}, to resume", _make_case("w.pt", SCRIPTS[name], option="--resume"), words=("w.pt",)
        )
        for name in ("a default argument that writes a file", "__setstate__")
    ),
    Case("weights: a FIFO", _make_case("w.pt", os.mkfifo)),
    Case("weights: a FIFO, safetensors", _make_case("w.safetensors", os.mkfifo)),
    Case("weights: a FIFO to resume from", _make_case("w.pt", os.mkfifo, option="--resume")),
    Case("weights: a device", _make_case("w.pt", lambda path: path.symlink_to("/dev/zero"))),
    Case("weights: a file of holes", _make_case("w.pt", lambda path: os.truncate(_touch(path), 2**40)), EITHER),
)


def _touch(path: Path) -> Path:
    path.touch()
    return path
