"""Changes inside containers, whose checksums, lengths and compression would otherwise reject a damaged part.

Each function takes a container's bytes, changes the bytes of one part with `change`, and returns a container that is
valid around that part.
"""

from __future__ import annotations

import base64
import gzip
import io
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

Change = Callable[[bytes], bytes]
Container = Callable[[bytes, Random, Change], bytes]

PICKLES = 0.6  # share of the changes in a zip that hit a pickle: tensors are most of the bytes
ALIGNMENT = 64  # torch maps the tensors of a checkpoint into memory
TAR_BLOCK, TAR_CHECKSUM = 512, slice(148, 156)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def change_gzip(document: bytes, rng: Random, change: Change) -> bytes:
    """Change the content of a gzip file."""
    return gzip.compress(change(gzip.decompress(document)), compresslevel=1, mtime=0)


def change_zip(document: bytes, rng: Random, change: Change) -> bytes:
    """Change one entry of a zip, usually a pickle, and correct its checksum."""
    with zipfile.ZipFile(io.BytesIO(document)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    pickles = [i for i, (name, _) in enumerate(entries) if name.endswith(".pkl")]
    chosen = rng.choice(pickles) if pickles and rng.random() < PICKLES else rng.randrange(len(entries))
    name, content = entries[chosen]
    entries[chosen] = (name, change(content))
    return write_zip(entries, compressed=rng.random() < 0.05)


def write_zip(entries: list[tuple[str, bytes]], *, compressed: bool = False) -> bytes:
    """Write a zip as torch does: uncompressed, each entry aligned to 64 bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, content in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = archive.compression
            begin = file.tell() + 30 + len(name.encode()) + 4
            padding = -begin % ALIGNMENT
            info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            archive.writestr(info, content)
    return file.getvalue()


def change_png(document: bytes, rng: Random, change: Change) -> bytes:
    """Change the type and data of a PNG chunk, or the uncompressed pixels of an IDAT chunk."""
    chunks, at = [], len(PNG_SIGNATURE)
    while at < len(document):
        (size,) = struct.unpack_from(">I", document, at)
        chunks.append(document[at + 4 : at + 8 + size])
        at += 12 + size
    chosen = rng.randrange(len(chunks))
    chunk = chunks[chosen]
    if chunk.startswith(b"IDAT") and rng.random() < 0.5:
        chunks[chosen] = b"IDAT" + zlib.compress(change(zlib.decompress(chunk[4:])))
    else:
        chunks[chosen] = change(chunk)
    packed = [struct.pack(">I", max(0, len(c) - 4)) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return PNG_SIGNATURE + b"".join(packed)


def change_tar(document: bytes, rng: Random, change: Change) -> bytes:
    """Change the header of a tar member, or its content within its blocks."""
    headers, at = [], 0
    while at + TAR_BLOCK <= len(document) and document[at]:
        headers.append(at)
        size = int(document[at + 124 : at + 135].strip(b"\0 ") or b"0", 8)
        at += TAR_BLOCK + -(-size // TAR_BLOCK) * TAR_BLOCK
    begin = rng.choice(headers)
    if rng.random() < 0.5:
        header = change(document[begin : begin + TAR_BLOCK])[:TAR_BLOCK].ljust(TAR_BLOCK, b"\0")
        header = header[:148] + b" " * 8 + header[156:]
        return document[:begin] + header[:148] + b"%06o\0 " % sum(header) + header[156:] + document[begin + TAR_BLOCK :]
    end = next((other for other in headers if other > begin), at)
    content = document[begin + TAR_BLOCK : end]
    return document[: begin + TAR_BLOCK] + change(content)[: len(content)].ljust(len(content), b"\0") + document[end:]


def change_safetensors(document: bytes, rng: Random, change: Change) -> bytes:
    """Change the header of a safetensors file, and correct its length."""
    (size,) = struct.unpack_from("<Q", document)
    header = change(document[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + document[8 + size :]


def change_base64_lines(document: bytes, rng: Random, change: Change) -> bytes:
    """Change the content of one line of `key <tab> base64`."""
    lines = document.splitlines()
    chosen = rng.randrange(len(lines))
    key, _, text = lines[chosen].partition(b"\t")
    lines[chosen] = key + b"\t" + base64.b64encode(change(base64.b64decode(text)))
    return b"\n".join(lines) + b"\n"


def change_lmdb(document: bytes, rng: Random, change: Change) -> bytes:
    """Change a value of an LMDB, or in one of ten cases a key; its pages stay valid."""
    with tempfile.TemporaryDirectory() as name:
        before, after = Path(name, "before"), Path(name, "after")
        before.mkdir()
        (before / "data.mdb").write_bytes(document)
        items = _lmdb_items(before)
        chosen = rng.randrange(len(items))
        key, value = items[chosen]
        items[chosen] = (change(key)[:500] or b"0", value) if rng.random() < 0.1 else (key, change(value))
        return write_lmdb(after, items)


def _lmdb_items(folder: Path) -> list[tuple[bytes, bytes]]:
    import lmdb

    with lmdb.open(str(folder), readonly=True, lock=False) as env, env.begin() as transaction:
        return [(bytes(key), bytes(value)) for key, value in transaction.cursor()]


def write_lmdb(folder: Path, items: list[tuple[bytes, bytes]]) -> bytes:
    """Write an LMDB folder and return the bytes of its data.mdb."""
    import lmdb

    size = 2**22 + 4 * sum(len(value) for _, value in items)
    with lmdb.open(str(folder), map_size=size, lock=False) as env, env.begin(write=True) as transaction:
        for key, value in items:
            transaction.put(key, value)
    return (folder / "data.mdb").read_bytes()
