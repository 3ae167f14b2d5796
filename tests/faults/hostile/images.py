"""Image files: other formats under image names, bombs, and valid images that readers often refuse."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from tests.faults.hostile.case import EITHER, MARKER, VALID, Case, evaluate
from tests.faults.readers.reader import encoded_image


def png(width: int, height: int, chunks: list[tuple[bytes, bytes]], depth: int = 8, colour: int = 0) -> bytes:
    """A PNG of arbitrary chunks."""
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in (head, *chunks)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _black(width: int, height: int) -> bytes:
    """A black greyscale image of any size in a few kilobytes."""
    packer, size, block = zlib.compressobj(1), (width + 1) * height, b"\0" * 2**20
    rows = b"".join(packer.compress(block[: size - begin]) for begin in range(0, size, len(block))) + packer.flush()
    return png(width, height, [(b"IDAT", rows), (b"IEND", b"")])


def _with_text(size: int) -> bytes:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("prompt", "x" * size, zip=True)
    file = io.BytesIO()
    Image.open(io.BytesIO(encoded_image(0))).save(file, "png", pnginfo=notes)
    return file.getvalue()


def _sixteen_bit() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)).save(file, "png")
    return file.getvalue()


def _two_pictures() -> bytes:
    """A JPEG with a second picture, as stereo cameras and phones write it."""
    pictures = [Image.open(io.BytesIO(encoded_image(i))) for i in range(2)]
    file = io.BytesIO()
    pictures[0].save(file, "mpo", save_all=True, append_images=pictures[1:])
    return file.getvalue()


def _eps() -> bytes:
    return (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
        + f"({MARKER}-eps) (w) file closefile\nshowpage\n%%EOF\n".encode()
    )


def _tiff(width: int, height: int, strips: int) -> bytes:
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, strips, 8), (277, 3, 1, 1), (278, 4, 1, 1), (279, 4, strips, 8)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def _gif(width: int, height: int, frames: int) -> bytes:
    frame = b"," + struct.pack("<HHHH", 0, 0, width, height) + b"\0\2\2L\1\0"
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0\0\0\0\xff\xff\xff" + frame * frames + b";"


def _bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


CONTENTS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "EPS": ("0.jpg", _eps),
    "EPS with a preview": (
        "0.jpg",
        lambda: b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIIIH", 30, 99, 0, 0, 0, 0, 0) + _eps(),
    ),
    "PDF": ("0.jpg", lambda: b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n"),
    "Windows metafile": ("0.jpg", lambda: b"\xd7\xcd\xc6\x9a" + b"\0" * 60),
    "XPM": ("0.jpg", lambda: b'/* XPM */\nstatic char *a[] = {\n"1 1 1 1",\n"a c #000",\n"a"\n};\n'),
    "SVG": ("0.png", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>'),
    "Photoshop": ("0.jpg", lambda: b"8BPS\0\1" + b"\0" * 6 + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + b"\0" * 30),
    "FITS": ("0.jpg", lambda: b"SIMPLE  =                    T".ljust(2880)),
    "icon": ("0.png", lambda: b"\0\0\1\0\1\0" + b"\xff" * 16 + b"\0" * 40),
    "PCX": ("0.jpg", lambda: b"\n\5\1\1" + struct.pack("<HHHH", 0, 0, 60000, 60000) + b"\0" * 120),
    "2^31 x 2^31 pixels": ("0.png", lambda: png(2**31 - 1, 2**31 - 1, [(b"IDAT", b""), (b"IEND", b"")])),
    "no pixels": ("0.png", lambda: png(0, 0, [(b"IDAT", zlib.compress(b"")), (b"IEND", b"")])),
    "a note of 200 MB": ("0.png", lambda: png(1, 1, [(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 200_000_000, 1))] * 20)),
    "TIFF of 2^32 strips": ("0.tif", lambda: _tiff(2**31 - 1, 2**31 - 1, 2**32 - 1)),
    "TIFF, huge": ("0.tif", lambda: _tiff(60000, 60000, 1)),
    "GIF of 65,535 x 65,535": ("0.gif", lambda: _gif(65535, 65535, 3)),
    "BMP, huge": ("0.bmp", lambda: _bmp(2**31 - 1, 2**31 - 1)),
    "BMP, negative": ("0.bmp", lambda: _bmp(-(2**31), -(2**31))),
    "PPM, huge": ("0.ppm", lambda: b"P6\n999999999999 999999999999\n255\n"),
    "PPM of text, endless": ("0.ppm", lambda: b"P3\n" + b"#" * 1_000_000 + b"\n"),
    "half a JPEG": ("0.jpg", lambda: encoded_image(0)[:300]),
    "nothing": ("0.jpg", lambda: b""),
    "a text": ("0.jpg", lambda: b"<html>404</html>"),
}
VALID_ONES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "PNG with 2 MB of notes": ("0.png", lambda: _with_text(2 * 2**20)),
    "JPEG with a second picture": ("0.jpg", _two_pictures),
    "16 bit grey": ("0.png", _sixteen_bit),
    "PNG under the name of a JPEG": ("0.jpg", lambda: encoded_image(0, "png")),
    "WebP under the name of a JPEG": ("0.jpg", lambda: encoded_image(0, "webp")),
    "CMYK": ("0.jpg", lambda: encoded_image(0, "jpeg", "CMYK")),
    "palette with a transparent colour": ("0.gif", lambda: encoded_image(0, "gif", "P", transparency=3)),
    "AVIF": ("0.avif", lambda: encoded_image(0, "avif")),
    "JPEG 2000": ("0.jp2", lambda: encoded_image(0, "jpeg2000")),
}


def _image(name: str, content: Callable[[], bytes]) -> Callable[[Path], list[object]]:
    def make(folder: Path) -> list[object]:
        typed = evaluate(folder, "--annotations", folder / "own.csv")
        (folder / name).write_bytes(content())
        (folder / "own.csv").write_text(f"image,caption\n{name},x\n1.jpg,y\n")
        return typed

    return make


def _not_a_file(put: Callable[[Path], Any]) -> Callable[[Path], list[object]]:
    """A case in which `put` replaces an image."""

    def make(folder: Path) -> list[object]:
        typed = evaluate(folder, "--annotations", folder / "own.csv")
        (folder / "own.csv").write_text("image,caption\nodd.jpg,x\n1.jpg,y\n")
        put(folder / "odd.jpg")
        return typed

    return make


def _socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # the path of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)


ODD: dict[str, Callable[[Path], Any]] = {
    "a FIFO": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a terminal": lambda path: path.symlink_to("/dev/ptmx"),
    "a folder": Path.mkdir,
    "a socket": _socket,
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to("/nowhere/at/all.jpg"),
    "a kernel file without end": lambda path: path.symlink_to("/proc/self/mem"),
}
IMAGES = (
    *(Case(f"image: {n}", _image(file, content), words=(file,)) for n, (file, content) in CONTENTS.items()),
    *(Case(f"image: {n}", _image(file, content), wanted=VALID) for n, (file, content) in VALID_ONES.items()),
    *(Case(f"image: {n}", _not_a_file(put), words=("odd.jpg",)) for n, put in ODD.items()),
    Case("image: a scan of 180 megapixels", _image("0.png", lambda: _black(20_000, 9_000)), wanted=VALID),
    Case("image: 900 megapixels", _image("0.png", lambda: _black(30_000, 30_000)), words=("0.png",)),
    Case("image: 4 x 30,000,000 pixels", _image("0.png", lambda: _black(4, 30_000_000)), words=("0.png",)),
    Case("image: 30,000,000 x 4 pixels", _image("0.png", lambda: _black(30_000_000, 4)), words=("0.png",)),
    Case("image: APNG", _image("0.png", lambda: encoded_image(0, "png", save_all=True)), wanted=EITHER),
)
