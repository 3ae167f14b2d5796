"""Readers of image files, format by format."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from tests.faults import tokens
from tests.faults.containers import change_png
from tests.faults.readers.reader import Reader, encoded_image, transform

Make = Callable[[], list[bytes]]


def _jpegs() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, progressive = encoded_image(0), encoded_image(1, progressive=True)
    return [plain, progressive, encoded_image(2, mode="CMYK"), encoded_image(3, mode="L", exif=exif)]


def _pngs() -> list[bytes]:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", "a note", zip=True)
    notes.add_itxt("Title", "ein Titel", "de")
    deep = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000).save(deep, "png")
    palette = encoded_image(2, "png", "P", transparency=3)
    return [encoded_image(0, "png", pnginfo=notes), encoded_image(1, "png", "RGBA"), palette, deep.getvalue()]


def _gifs() -> list[bytes]:
    frames = [Image.open(io.BytesIO(encoded_image(i))).convert("P") for i in range(3)]
    file = io.BytesIO()
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:], loop=0)
    return [encoded_image(0, "gif", "P"), file.getvalue(), encoded_image(1, "gif", "L")]


def _tiffs() -> list[bytes]:
    kinds = [
        ("RGB", None),
        ("L", "tiff_lzw"),
        ("RGB", "tiff_deflate"),
        ("RGB", "jpeg"),
        ("1", "group4"),
        ("I;16", None),
    ]
    kinds += [("CMYK", "packbits"), ("F", "zstd"), ("P", "lzma")]
    return [encoded_image(i, "tiff", mode, compression=how) for i, (mode, how) in enumerate(kinds)]


def _webps() -> list[bytes]:
    return [encoded_image(0, "webp"), encoded_image(1, "webp", lossless=True), encoded_image(2, "webp", "RGBA")]


def _bmps() -> list[bytes]:
    return [encoded_image(i, "bmp", mode) for i, mode in enumerate(("RGB", "P", "1", "RGBA"))]


def _ppms() -> list[bytes]:
    return [
        *(encoded_image(i, "ppm", mode) for i, mode in enumerate(("RGB", "L", "1"))),
        b"P3\n2 1\n255\n1 2 3 4 5 6\n",
    ]


def _avifs() -> list[bytes]:
    return [encoded_image(0, "avif"), encoded_image(1, "avif", "RGBA")]


def _jp2s() -> list[bytes]:
    return [encoded_image(0, "jpeg2000"), encoded_image(1, "jpeg2000", "LA"), encoded_image(2, "jpeg2000", no_jp2=True)]


def _make(suffix: str, documents: Make) -> Callable[[Path], list[Path]]:
    def write(folder: Path) -> list[Path]:
        paths = []
        for number, content in enumerate(documents()):
            paths.append(folder / f"{number}.{suffix}")
            paths[-1].write_bytes(content)
        return paths

    return write


def _read(path: Path) -> None:
    from clip_retrieval.data.images.image_files import ImageFiles

    images = ImageFiles([str(path)])
    transform()(images[0])
    images.stamp(0)


_FORMATS: dict[str, Make] = {
    "jpeg": _jpegs,
    "png": _pngs,
    "gif": _gifs,
    "tiff": _tiffs,
    "webp": _webps,
    "bmp": _bmps,
    "ppm": _ppms,
    "avif": _avifs,
    "jp2": _jp2s,
}
IMAGES = tuple(
    Reader(f"{name} image", _make(name, make), _read, tokens.IMAGES[name], (change_png,) if name == "png" else ())
    for name, make in _FORMATS.items()
)
