"""Image files decoded with Pillow: the one place of the package that opens an image.

Only the formats in FORMATS are tried, by their content and not by the file's name. Pillow knows forty others, and some
of them start programs (Ghostscript for an EPS) or have decoders that nobody tests.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import re
import warnings
from collections.abc import Callable
from typing import BinaryIO

from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError, _imaging

from clip_retrieval.errors import RunError, UserError
from clip_retrieval.files import open_regular
from clip_retrieval.options import MAX_IMAGE_PIXELS

LARGEST_FILE = 2**31  # bytes of an encoded image that are read into memory
LONGEST_SIDE = 2**20  # pixels; each row takes memory and time beside its pixels
MOST_SCANS = 500  # of a progressive JPEG, which has about ten; each goes over the whole image, and takes 500 bytes
LONGEST = 256  # the long side of an image, in short sides; the rest of the long side is cut off

for _plugin in ("Jpeg", "Mpo", "Png", "WebP", "Gif", "Bmp", "Tiff", "Ppm", "Jpeg2K", "Avif"):
    with contextlib.suppress(ImportError):  # Pillow before 11.3 has no AVIF
        importlib.import_module(f"PIL.{_plugin}ImagePlugin")
FORMATS = [
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
]

warnings.filterwarnings("ignore", module=r"PIL\.")  # about sizes, palettes and EXIF
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it logs errors that it raises as well
with contextlib.suppress(OSError, AttributeError):  # libtiff prints them to the terminal, if it is there
    _set_handler = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
    _set_handler.argtypes, _set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    _set_handler(None)


class _PngWithoutText(PngImagePlugin.PngStream):
    """Skips the texts and the colour profile of a PNG, which nothing here uses.

    Pillow decompresses them, and refuses the image if one is longer than a megabyte.
    """

    def _skip(self, pos: int, length: int) -> bytes:
        return ImageFile._safe_read(self.fp, length)

    chunk_tEXt = chunk_zTXt = chunk_iTXt = chunk_iCCP = _skip


PngImagePlugin.PngStream = _PngWithoutText


def limit_image_pixels(pixels: int) -> None:
    """Refuse larger images in this process, and in the loader processes that it starts from now on."""
    Image.MAX_IMAGE_PIXELS = pixels / 2  # Pillow warns above this number, and raises above twice this number


def image_pixels_limit() -> int:
    """The number of pixels from `limit_image_pixels`."""
    return int(Image.MAX_IMAGE_PIXELS * 2)


limit_image_pixels(MAX_IMAGE_PIXELS)


def as_rgb(image: Image.Image) -> Image.Image:
    """An image as Pillow's `convert` makes it RGB; convert would copy an image that is RGB already."""
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_rgb(source: str | BinaryIO, name: str, to_rgb: Callable[[Image.Image], Image.Image] = as_rgb) -> Image.Image:
    """Decode an image file, or its bytes (a file that is closed then), to RGB; of an animation, the first frame.

    Only the middle of an image that is more than LONGEST times as long as it is wide is kept: a model sees no more of
    it, and resizing all of it would take gigabytes.

    Raises:
        UserError: with `name`, if the file is missing, no regular file, damaged, of another format or too large.
        RunError: the memory does not suffice.
    """
    try:
        # An open file, not its name: Pillow maps some formats to memory by their name, and dies if they then shrink.
        file = open_regular(source) if isinstance(source, str) else source
        with file, Image.open(file, formats=FORMATS) as image:
            if max(image.size) > LONGEST_SIDE:
                raise ValueError(f"{image.width:,} x {image.height:,} pixels are no picture")
            if image.info.get("progressive"):
                _check_scans(file)
            image.load()
            return to_rgb(shorten_middle(image, LONGEST))
    except FileNotFoundError:
        raise no_such_image(name) from None
    except Image.DecompressionBombError as error:
        raise UserError(_describe_pixels(name, str(error))) from None
    except MemoryError:
        raise RunError(
            f"{name}: the memory does not suffice to decode this image; choose fewer --num_workers, or take it out"
        ) from None
    # Pillow's decoders raise nearly anything on a broken file (struct.error, EOFError, SyntaxError, ...).
    except Exception as error:
        raise UserError(f"{name}: not a readable image ({_describe(error)}); {_choose_remedy(error)}") from None


def _check_scans(file: BinaryIO) -> None:
    """Raise ValueError if a JPEG has so many scans that decoding it would take minutes."""
    position = file.seek(0)
    scans = sum(part.count(b"\xff\xda") for part in iter(lambda: file.read(2**20), b""))
    file.seek(position)
    if scans > MOST_SCANS:
        raise ValueError(f"a JPEG of {scans:,} scans")


def shorten_middle(image: Image.Image, longest: int) -> Image.Image:
    """The middle of an image that is more than `longest` times as long as it is wide; others as they are."""
    width, height = image.size
    kept = longest * min(width, height)
    if max(width, height) <= kept:
        return image
    left, top = max(0, (width - kept) // 2), max(0, (height - kept) // 2)
    return image.crop((left, top, min(width, left + kept), min(height, top + kept)))


def read_encoded(path: str) -> bytes:
    """The bytes of an image file. Raises UserError if it is no regular file, or too large to be an image."""
    try:
        with open_regular(path) as file:
            check_encoded_size(os.fstat(file.fileno()).st_size, path)
            return file.read()
    except FileNotFoundError:
        raise no_such_image(path) from None
    except OSError as error:
        raise UserError(f"{path}: not a readable image ({error.strerror}); fetch it again or take it out") from None


def check_encoded_size(size: int, name: str) -> None:
    """Raise UserError if an image file of `size` bytes is too large to be read into memory."""
    if size > LARGEST_FILE:
        raise UserError(f"{name}: more than {LARGEST_FILE >> 30} GiB, too large for an image; take it out")


def no_such_image(path: str) -> UserError:
    """The error for an image that is missing."""
    return UserError(f"{path}: no such image; check --image_dir or --dataset_root")


def _describe_pixels(name: str, text: str) -> str:
    found = re.search(r"\((\d+) pixels\)", text)
    pixels = f"{int(found[1]):,} pixels" if found else "more pixels"
    return f"{name}: {pixels} are more than --max_image_pixels {image_pixels_limit()}; raise it, or take the image out"


def _describe(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own text repeats the path
        return f"none of the formats {', '.join(FORMATS)}, or damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _choose_remedy(error: Exception) -> str:
    other = "convert it to JPEG or PNG, " if isinstance(error, UnidentifiedImageError) else ""
    return f"{other}fetch it again or take it out"
