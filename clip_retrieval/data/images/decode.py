"""Image files decoded with Pillow: the one place of the package that opens an image.

Only the formats in FORMATS are tried, by content and not by file name. Pillow supports forty others; some of them start
programs (Ghostscript for an EPS) or have untested decoders.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import logging
import mmap
import os
import re
import warnings
from collections.abc import Callable
from typing import IO, Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError, _imaging

from clip_retrieval.errors import RunError, UserError, describe
from clip_retrieval.files import open_regular
from clip_retrieval.log import log
from clip_retrieval.options import MAX_IMAGE_PIXELS

LARGEST_FILE = 2**31  # bytes of an encoded image
LONGEST_SIDE = 2**20  # pixels; each row costs memory and time besides its pixels
MOST_SCANS = 500  # of a progressive JPEG, which has about ten; each takes 500 bytes and decodes the whole image
LONGEST = 256  # long side of an image in short sides; the excess is cropped

for _plugin in ("Jpeg", "Mpo", "Png", "WebP", "Gif", "Bmp", "Tiff", "Ppm", "Jpeg2K", "Avif"):
    with contextlib.suppress(ImportError):  # Pillow before 11.3 has no AVIF
        importlib.import_module(f"PIL.{_plugin}ImagePlugin")
FORMATS: list[str] = [
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
]

warnings.filterwarnings("ignore", module=r"PIL\.")  # on sizes, palettes and EXIF
logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it logs errors that it also raises
with contextlib.suppress(OSError, AttributeError):  # libtiff prints errors to the terminal
    _set_handler = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
    _set_handler.argtypes, _set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    _set_handler(None)


class _PngWithoutText(PngImagePlugin.PngStream):
    """PNG decoder that skips texts and colour profiles.

    Pillow decompresses them, and refuses the image if one is longer than a megabyte.
    """

    fp: IO[bytes]  # None only after the last chunk

    def _skip(self, pos: int, length: int) -> bytes:
        return ImageFile._safe_read(self.fp, length)

    chunk_tEXt = chunk_zTXt = chunk_iTXt = chunk_iCCP = _skip


PngImagePlugin.PngStream = _PngWithoutText  # type: ignore[misc]  # a patch
_pillow: Any = Image  # it annotates MAX_IMAGE_PIXELS as an int


def limit_image_pixels(pixels: int) -> None:
    """Refuse larger images in this process, and in loader processes that it starts afterwards."""
    _pillow.MAX_IMAGE_PIXELS = pixels / 2  # Pillow warns above this number and raises above twice this number


def image_pixels_limit() -> int:
    """Return the limit set by `limit_image_pixels`."""
    return int(_pillow.MAX_IMAGE_PIXELS * 2)


limit_image_pixels(MAX_IMAGE_PIXELS)


_scaling_is_logged = mmap.mmap(-1, 1)  # shared with the loader processes that this one forks


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB as Pillow does, without the copy that Pillow makes of an RGB image.

    Grey levels of more than 8 bits, which Pillow would clip to white, are scaled to 8 bits.
    """
    if image.mode.startswith("I"):
        image = _scale_levels(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale_levels(image: Image.Image) -> Image.Image:
    """Scale the grey levels of an image to 8 bits from the fewest bits that hold the highest: 12, 16, ..."""
    levels = np.asarray(image)
    bits = int(levels.max()).bit_length()
    if bits <= 8:
        return image
    if not _scaling_is_logged[0]:
        _scaling_is_logged[0] = 1
        log.warning("there are grey images of more than 8 bits: their levels are scaled to 8 bits, 0 to 255")
    levels = np.maximum(levels, 0)
    if bits > 16:
        levels, bits = levels >> (bits - 16), 16
    scaled = np.round(np.arange(1 << bits) * (255 / ((1 << bits) - 1))).astype(np.uint8)
    return Image.fromarray(scaled[levels])


def decode_rgb(
    source: str | BinaryIO,
    name: str,
    to_rgb: Callable[[Image.Image], Image.Image] = as_rgb,
    *,
    min_side: int | None = None,
) -> Image.Image:
    """Decode an image to RGB; of an animation, the first frame.

    An image that is more than LONGEST times as long as it is wide is cropped to its middle: a model sees no more of
    it, and resizing all of it would take gigabytes.

    Args:
        source: path of the image, or an open file, which is closed.
        name: name of the image, for messages.
        to_rgb: converts the decoded image.
        min_side: pixels of each side that are enough, for a thumbnail: a larger JPEG may be decoded at a half, a
            quarter or an eighth of its size, which is several times faster.

    Raises:
        UserError: the file is missing, not a regular file, damaged, of another format or too large.
        RunError: the memory is too small.
    """
    try:
        # Pass an open file: given a path, Pillow memory-maps some formats, and crashes if the file shrinks.
        file = open_regular(source) if isinstance(source, str) else source
        with file, Image.open(file, formats=FORMATS) as image:
            if max(image.size) > LONGEST_SIDE:
                raise ValueError(f"{image.width:,} x {image.height:,} pixels are too long for an image")
            if image.info.get("progressive"):
                _check_scans(file)
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            image.load()
            return to_rgb(shorten_middle(image, LONGEST))
    except FileNotFoundError:
        raise make_missing_error(name) from None
    except Image.DecompressionBombError as error:
        raise UserError(_describe_pixels(name, str(error))) from None
    except MemoryError:
        raise RunError(
            f"{name}: the memory is too small to decode this image; choose fewer --num_workers, or delete the image"
        ) from None
    except UnidentifiedImageError:
        raise UserError(
            f"{name}: not a readable image (none of the formats {', '.join(FORMATS)}, or damaged); convert it to JPEG "
            "or PNG, fetch it again or delete it"
        ) from None
    # Pillow's decoders raise nearly anything on a broken file (struct.error, EOFError, SyntaxError, ...).
    except Exception as error:
        raise UserError(f"{name}: not a readable image ({describe(error)}); fetch it again or delete it") from None


def _check_scans(file: BinaryIO) -> None:
    """Raise ValueError if a JPEG has so many scans that decoding it would take minutes."""
    position = file.seek(0)
    scans = sum(part.count(b"\xff\xda") for part in iter(lambda: file.read(2**20), b""))
    file.seek(position)
    if scans > MOST_SCANS:
        raise ValueError(f"a JPEG of {scans:,} scans")


def baseline_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a complete baseline JPEG file in grey or YCbCr; None for any other file.

    Only the header is read. Such files are decoded alike by every decoder; the others need `decode_rgb`.
    """
    if not content.startswith(b"\xff\xd8") or not content.rstrip(b"\0\r\n").endswith(b"\xff\xd9"):
        return None
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            is_plain = image.mode == "L" or (image.mode == "RGB" and image.info.get("adobe_transform") != 0)
            is_short = max(image.size) <= min(LONGEST_SIDE, LONGEST * min(image.size))
            if image.format == "JPEG" and is_plain and is_short and not image.info.get("progressive"):
                return image.size
    except Exception:  # as many as in decode_rgb, which names the fault
        return None
    return None


def shorten_middle(image: Image.Image, longest: int) -> Image.Image:
    """Crop an image that is more than `longest` times as long as it is wide to its middle."""
    width, height = image.size
    side = longest * min(width, height)
    if max(width, height) <= side:
        return image
    left, top = max(0, (width - side) // 2), max(0, (height - side) // 2)
    return image.crop((left, top, min(width, left + side), min(height, top + side)))


def read_encoded(path: str) -> bytes:
    """Read the bytes of an image file. Raises UserError if it is missing, not a regular file, or too large."""
    try:
        with open_regular(path) as file:
            check_encoded_size(os.fstat(file.fileno()).st_size, path)
            return file.read()
    except FileNotFoundError:
        raise make_missing_error(path) from None
    except OSError as error:
        raise UserError(f"{path}: not a readable image ({error.strerror}); fetch it again or delete it") from None


def check_encoded_size(size: int, name: str) -> None:
    """Raise UserError if an image file of `size` bytes is too large to be read into memory."""
    if size > LARGEST_FILE:
        raise UserError(f"{name}: more than {LARGEST_FILE >> 30} GiB, too large for an image; delete it")


def make_missing_error(path: str) -> UserError:
    """Return the error for a missing image."""
    return UserError(f"{path}: no such image; check --image_dir or --dataset_root")


def _describe_pixels(name: str, text: str) -> str:
    found = re.search(r"\((\d+) pixels\)", text)
    pixels = f"{int(found[1]):,} pixels" if found else "more pixels"
    return f"{name}: {pixels} are more than --max_image_pixels {image_pixels_limit()}; raise it, or delete the image"
