"""LMDB folders, tar shards and saved datasets that run code, hang, or need more memory than available."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.data.make_shards import write_shard
from tests.faults.containers import write_lmdb
from tests.faults.hostile.case import EITHER, MARKER, REFUSED, VALID, Case, evaluate, finetune
from tests.faults.hostile.texts import DEEP, DIGITS
from tests.faults.readers.packed import _make_saved
from tests.faults.readers.reader import encoded_image

HUGE = 64 * 2**30 - 1  # bytes that a tar header claims; octal digits express up to 8 GB


class Runs:
    """An object whose pickle creates a folder when it is read."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (f"{MARKER}-pickle",)


def _nested_lists() -> bytes:
    """A list of ten lists of ten lists ..., which share their contents: 10^13 strings when printed."""
    value: list = ["x" * 10]
    for _ in range(12):
        value = [value] * 10
    return pickle.dumps(value)


PAIRS: dict[str, bytes] = {
    "nested lists": _nested_lists(),
    "5,000 digits": pickle.dumps((10**5000, 2, "x")),
    "a memo of 2^28": b"\x80\x02K\x01r" + struct.pack("<I", 2**28) + b"K\x02X\x01\0\0\0x\x87.",
    "a text of 2^31 bytes": b"\x80\x02K\x01K\x02X\xff\xff\xff\x7fx\x87.",
    "a text of 2^62 bytes": b"\x80\x04K\x01K\x02\x8d" + struct.pack("<Q", 2**62) + b"x\x87.",
    "a bytearray of 2^40 bytes": b"\x80\x05K\x01K\x02\x96" + struct.pack("<Q", 2**40) + b"x\x87.",
    "a number of 2^31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7f\x01",
    "a decimal number of 5,000 digits": b"(I" + DIGITS.encode() + b"\nI2\nVx\nt.",
    "a frame of 2^62 bytes": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"K\x01.",
    "tuples in each other": b"(" * 100_000 + b"t" * 100_000 + b".",
    "lists in each other": b"]" * 100_000 + b"a" * 99_999 + b".",
    "code": pickle.dumps(Runs()),
    "code of an old protocol": f"cos\nmkdir\n(V{MARKER}-old\ntR.".encode(),
    "code by a name in the stack": b"\x80\x04\x8c\2os\x8c\5mkdir\x93\x8c\6marker\x85R.",
    "a persistent id": b"\x80\x02K\x01Q.",
    "half a surrogate pair": b"\x80\x04K\x01K\x02X\3\0\0\0\xed\xa0\x80\x87.",
    "nothing": b"",
}
# The memo of Python's unpickler is a dictionary.
HARMLESS_PAIRS = {"half a surrogate pair": EITHER, "a memo of 2^28": VALID}


def _lmdb(pair: bytes = b"", count: bytes = b"1", change: Callable[[Path], Any] | None = None) -> Callable:
    """A case with an LMDB of one image and one pair."""

    def make(folder: Path) -> list[object]:
        place = folder / "lmdb" / "test"
        place.mkdir(parents=True)
        write_lmdb(place / "imgs", [(b"1", base64.b64encode(encoded_image(0))), (b"num_images", b"1")])
        held = pair or pickle.dumps((1, 2, "x"))
        write_lmdb(place / "pairs", [(b"0", held), (b"num_samples", count)])
        if change:
            change(place)
        return evaluate(folder, "--dataset", "chinese", "--dataset_root", folder, "--annotations", None)

    return make


def _remove_pages(place: Path) -> None:
    """Make the two first pages of an LMDB refer to a page beyond the file."""
    data = place / "pairs" / "data.mdb"
    content = bytearray(data.read_bytes())
    for meta in (0, 4096):
        root = meta + 16 + 24 + 48 + 40  # md_root of the main tree
        content[root : root + 8] = struct.pack("<Q", 10**9)
    data.write_bytes(content)


def _last_page(place: Path) -> None:
    data = place / "pairs" / "data.mdb"
    content = bytearray(data.read_bytes())
    for meta in (0, 4096):
        content[meta + 16 + 24 + 96 : meta + 16 + 24 + 104] = struct.pack("<Q", 2**63)
    data.write_bytes(content)


def _fifo(name: str) -> Callable[[Path], None]:
    def replace(place: Path) -> None:
        shutil.rmtree(place / name) if (place / name).is_dir() else (place / name).unlink()
        os.mkfifo(place / name)

    return replace


LMDB = (
    *(
        Case(f"lmdb pair: {name}", _lmdb(pair), HARMLESS_PAIRS.get(name, REFUSED))
        for name, pair in PAIRS.items()
        if pair
    ),
    Case("lmdb: a count of 5,000 digits", _lmdb(count=b"9" * 5000)),
    Case("lmdb: a count of 10^18", _lmdb(count=b"9" * 18)),
    Case("lmdb: a count of other digits", _lmdb(count="²".encode())),
    Case("lmdb: a page that is not there", _lmdb(change=_remove_pages)),
    Case("lmdb: 2^63 pages", _lmdb(change=_last_page)),
    Case("lmdb: a FIFO", _lmdb(change=_fifo("pairs/data.mdb"))),
)


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE, **fields: bytes) -> bytes:
    """A tar header with a correct checksum and any `size`."""
    info = tarfile.TarInfo(name)
    info.type = kind
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"%011o\0" % size if 0 <= size < 8**11 else b"\x80" + size.to_bytes(11, "big", signed=True)
    for place, content in fields.items():
        begin = int(place.removeprefix("at"))
        header[begin : begin + len(content)] = content
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _sparse(size: int) -> bytes:
    """A sparse member of this size that is one hole."""
    octal = b"%011o\0" % min(size, 8**11 - 1)
    return _header("0.jpg", 512, tarfile.GNUTYPE_SPARSE, at386=b"\0" * 12, at410=b"\0" * 12, at483=octal) + b"\0" * 512


def _pax(text: bytes, kind: bytes = b"x") -> bytes:
    return _header("././@PaxHeader", len(text), kind) + text.ljust(-(-len(text) // 512) * 512, b"\0")


def _member(name: str, content: bytes) -> bytes:
    return _header(name, len(content)) + content.ljust(-(-len(content) // 512) * 512, b"\0")


END = b"\0" * 1024
TARS: dict[str, Callable[[], bytes]] = {
    "a sparse member of 8 GB": lambda: _sparse(HUGE) + _member("0.txt", b"x") + END,
    "a sparse member, base 256": lambda: _header("0.jpg", 2**40, tarfile.GNUTYPE_SPARSE) + _member("0.txt", b"x") + END,
    "a sparse member of pax": lambda: (
        _pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n31 GNU.sparse.realsize=99999999\n")
        + _member("0.jpg", b"9999999999\n" * 40)
        + END
    ),
    "a member of 2^60 bytes": lambda: _header("0.jpg", 2**60) + END,
    "a member of -512 bytes": lambda: _header("0.jpg", -512) + _member("0.txt", b"x") + END,
    "a long name of 8 GB": lambda: _header("././@LongLink", 8**11 - 1, b"L") + END,
    "long names without end": lambda: (_header("././@LongLink", 512, b"L") + b"a" * 512) * 5000 + END,
    "pax headers without end": lambda: _pax(b"11 path=ab\n") * 5000 + END,
    "a pax header of 8 GB": lambda: _header("././@PaxHeader", 8**11 - 1, b"x") + END,
    "a pax size of 5,000 digits": lambda: (
        _pax(b"5010 size=" + DIGITS.encode()[:5000] + b"\n") + _member("0.jpg", b"x") + END
    ),
    "a pax size below 0": lambda: _pax(b"12 size=-99\n") + _member("0.jpg", b"x") + END,
    "a pax path with a NUL": lambda: _pax(b"14 path=a\0.jpg\n") + _member("0.jpg", b"x") + END,
    "names that are not UTF-8": lambda: _member("0", b"") + _header("a", 0, at0=b"\xff\xfe.jpg") + END,
    "links": lambda: _header("0.jpg", 0, b"2", at157=b"/dev/zero") + _member("0.txt", b"x") + END,
    "a device": lambda: _header("0.jpg", 0, b"3") + _member("0.txt", b"x") + END,
    "a gzip file": lambda: b"\x1f\x8b\x08\0" + b"\0" * 2044,
    "JSON nested 100,000 deep": lambda: _member("0.jpg", encoded_image(0)) + _member("0.json", DEEP.encode()) + END,
    "JSON of 5,000 digits": lambda: _member("0.jpg", encoded_image(0)) + _member("0.json", DIGITS.encode()) + END,
}


def _shard(content: Callable[[], bytes], *, train: bool) -> Callable[[Path], list[object]]:
    def make(folder: Path) -> list[object]:
        good = [(f"{i}", {"jpg": encoded_image(i), "txt": "a thing"}) for i in range(4)]
        shard = folder / "bad.tar"
        shard.write_bytes(content())
        typed = evaluate(folder, "--dataset", "webdataset", "--annotations", None, "--val_data", shard)
        if not train:
            return [*typed, "--eval_split", "val"]
        write_shard(folder / "val.tar", good)
        data = [
            "--dataset",
            "webdataset",
            "--annotations",
            None,
            "--train_data",
            shard,
            "--val_data",
            folder / "val.tar",
        ]
        return finetune(folder, *data)

    return make


def _fifo_shard(folder: Path) -> list[object]:
    typed = _shard(lambda: b"", train=True)(folder)
    (folder / "bad.tar").unlink()
    os.mkfifo(folder / "bad.tar")
    return typed


def _sizes(text: str) -> Callable[[Path], list[object]]:
    def make(folder: Path) -> list[object]:
        samples = [(f"{i}", {"jpg": encoded_image(i), "txt": "a thing"}) for i in range(4)]
        buffer = io.BytesIO()
        write_shard(folder / "bad.tar", samples)
        buffer.write((folder / "bad.tar").read_bytes())
        typed = _shard(buffer.getvalue, train=True)(folder)
        (folder / "sizes.json").write_text(text)
        return typed

    return make


SHARDS = (
    *(
        Case(
            f"shard, {'trained on' if train else 'evaluated'}: {name}",
            _shard(content, train=train),
            EITHER if "pax path" in name else "refused",
            words=("bad.tar",),
        )
        for name, content in TARS.items()
        for train in (False, True)
    ),
    Case("shard: a FIFO", _fifo_shard),
    Case("sizes.json: 2^50 samples", _sizes('{"bad.tar": 1125899906842624}')),
    Case("sizes.json: 5,000 digits", _sizes(f'{{"bad.tar": {DIGITS}}}')),
    Case("sizes.json: 5,000 digits in quotes", _sizes(f'{{"bad.tar": "{DIGITS}"}}')),
    Case("sizes.json: nested 100,000 deep", _sizes(DEEP)),
)


def _make_saved_case(change: Callable[[Path], Any]) -> Callable[[Path], list[object]]:
    """A case with a changed dataset of save_to_disk."""

    def make(folder: Path) -> list[object]:
        _make_saved(folder / "saved")
        change(folder / "saved" / "bytes")
        return evaluate(
            folder, "--dataset", "huggingface", "--dataset_root", folder / "saved" / "bytes", "--annotations", None
        )

    return make


def _write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def _state(**changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(content | changes))

    return change


def _feature(kind: dict[str, Any]) -> Callable[[Path], Any]:
    """Give the image column in dataset_info.json a type that the library would look up."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "dataset_info.json").read_text())
        content["features"]["image"] = kind
        (folder / "dataset_info.json").write_text(json.dumps(content))

    return change


SAVED = (
    Case("saved folder: state.json is a FIFO", _make_saved_case(_fifo("state.json"))),
    Case("saved folder: dataset_info.json is a FIFO", _make_saved_case(_fifo("dataset_info.json")), EITHER),
    Case("saved folder: the data are a FIFO", _make_saved_case(_fifo("data-00000-of-00001.arrow"))),
    Case("saved folder: the data are a device", _make_saved_case(_state(_data_files=[{"filename": "/dev/zero"}]))),
    Case(
        "saved folder: the data are elsewhere",
        _make_saved_case(_state(_data_files=[{"filename": "../../../etc/passwd"}])),
    ),
    Case("saved folder: no data", _make_saved_case(_state(_data_files=[]))),
    Case("saved folder: a NUL in a name", _make_saved_case(_state(_data_files=[{"filename": "a\0b"}]))),
    Case(
        "saved folder: half a surrogate pair in a name", _make_saved_case(_state(_data_files=[{"filename": "\ud800"}]))
    ),
    Case("saved folder: a number for a name", _make_saved_case(_state(_data_files=[{"filename": 3}]))),
    Case("saved folder: state.json nested 100,000 deep", _make_saved_case(_write("state.json", DEEP))),
    Case("saved folder: state.json of 5,000 digits", _make_saved_case(_write("state.json", DIGITS))),
    Case("saved folder: dataset_info.json nested deep", _make_saved_case(_write("dataset_info.json", DEEP)), EITHER),
    Case(
        "saved folder: a column of a strange type",
        _make_saved_case(_feature({"_type": "Popen", "args": ["touch", MARKER]})),
        EITHER,
    ),
    Case("saved folder: a column of no type", _make_saved_case(_feature({"dtype": DIGITS, "_type": "Value"})), EITHER),
)
PACKED = (*LMDB, *SHARDS, *SAVED)
