"""TorchScript archives: torch.jit.load evaluates default arguments and __setstate__ while loading."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.faults.containers import write_zip
from tests.faults.hostile.case import MARKER
from tests.faults.hostile.packed import Runs

Write = Callable[[Path], Any]
Change = Callable[[str, bytes], tuple[str, bytes]]


class _Plain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.a


class _SetsState(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.ones(3))

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.a, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        torch.save(state[0], "marker-setstate")
        self.a = state[0]
        self.training = state[1]


def _script(module: type[torch.nn.Module], change: Change) -> Write:
    """A TorchScript archive with changed entries."""

    def write(path: Path) -> None:
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.script(module()), buffer)
        with zipfile.ZipFile(buffer) as archive:
            entries = [change(info.filename, archive.read(info)) for info in archive.infolist()]
        path.write_bytes(write_zip([*entries, ("archive/code/more.py", b"")]))

    return write


def _default(text: str) -> Change:
    """A default argument that torch.jit.load evaluates."""

    def change(name: str, content: bytes) -> tuple[str, bytes]:
        if name.endswith(".py"):
            content = content.replace(b"x: Tensor)", f"x: Tensor={text})".encode())
        return name, content

    return change


def _rename(old: str, new: str, inner: Change) -> Change:
    def change(name: str, content: bytes) -> tuple[str, bytes]:
        name, content = inner(name, content)
        return name.replace(old, new), content

    return change


def _entry_is(ending: str, replacement: bytes) -> Change:
    return lambda name, content: (name, replacement if name.endswith(ending) else content)


LOOP = b"""def forever(n: int) -> int:
  m = n
  while torch.gt(m, 0):
    m = torch.add(m, 1)
    if torch.gt(m, 1000):
      m = 1
    else:
      pass
  return m
"""


def _endless(name: str, content: bytes) -> tuple[str, bytes]:
    """A default argument that calls an endless function."""
    if name.endswith(".py"):
        module = name.partition("/code/")[2].removesuffix(".py").replace("/", ".")
        content = content.replace(b"x: Tensor)", f"x: int={module}.forever(1))".encode())
        content = content.replace(b"torch.add(x, a)", b"a") + LOOP
    return name, content


def _same(name: str, content: bytes) -> tuple[str, bytes]:
    return name, content


WRITES = f'torch.from_file("{MARKER}-default", True, 4)'
TOO_LARGE = "torch.ones([9223372036854775807])"
SCRIPTS: dict[str, Write] = {
    "a default argument that writes a file": _script(_Plain, _default(WRITES)),
    "a default argument of 2^65 bytes": _script(_Plain, _default(TOO_LARGE)),
    "a default argument of 40 GB": _script(_Plain, _default("torch.ones([100000, 100000])")),
    "a default argument that loops for ever": _script(_Plain, _endless),
    "code under /Code/": _script(_Plain, _rename("/code/", "/Code/", _default(WRITES))),
    "code under /CODE/": _script(_Plain, _rename("/code/", "/CODE/", _default(WRITES))),
    "__setstate__": _script(_SetsState, _same),
    "__setstate__ under /Code/": _script(_SetsState, _rename("/code/", "/Code/", _same)),
    "code in data.pkl": _script(_Plain, _entry_is("data.pkl", pickle.dumps(Runs()))),
    "code in constants.pkl": _script(_Plain, _entry_is("constants.pkl", pickle.dumps(Runs()))),
    "code that is no code": _script(_Plain, _entry_is(".py", b"while True:\n    pass\n" * 1000)),
    "a class in the pickle that torch has": _script(
        _Plain, _entry_is("data.pkl", b"\x80\2ctorch\nload\nX\6\0\0\0marker\x85R.")
    ),
    "no data.pkl": _script(_Plain, _rename("data.pkl", "nothing.pkl", _same)),
}
