"""Images in files, found in the folders that may hold them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clip_retrieval.data.images.decode import decode_rgb, make_missing_error, read_encoded
from clip_retrieval.errors import UserError, describe


class ImageFiles:
    """Image files, opened with Pillow and converted to RGB as its `convert` does (grey, palette, CMYK, 16-bit)."""

    def __init__(self, paths: Sequence[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        return decode_rgb(self.paths[index], self.paths[index])

    def name(self, index: int) -> str:
        return self.paths[index]

    def stamp(self, index: int) -> tuple[int, int]:
        """Size in bytes and time of the last change (ns) of the file; they differ if its content does."""
        try:
            found = os.stat(self.paths[index])  # noqa: PTH116  a Path for each of 100,000 files takes longer than this
        except FileNotFoundError:
            raise make_missing_error(self.paths[index]) from None
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise UserError(f"{self.paths[index]}: not a readable image ({describe(error)})") from None
        return found.st_size, found.st_mtime_ns

    def encoded(self, index: int) -> bytes:
        """The bytes of the file."""
        return read_encoded(self.paths[index])


class ImageArray:
    """Decoded images: uint8 (images, height, width, 3), in memory or memory-mapped."""

    def __init__(self, pixels: np.ndarray, name: str):
        self.pixels = pixels
        self._name = name

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(np.asarray(self.pixels[index]))

    def name(self, index: int) -> str:
        return f"{self._name} image {index}"


def find_image_files(places: Iterable[tuple[str | Path, Sequence[str]]], source: str | Path) -> ImageFiles:
    """Find the image files of a data set, each in the first place that holds it.

    Each folder is listed once instead of checking each file: a hundred thousand images take a fraction of a second,
    also on a network drive. Later places are searched only for images that are still missing.

    Args:
        places: (folder, names) for each way in which the images may be stored; image i is names[i] everywhere. A name
            may contain subfolders, or be absolute.
        source: the file that names the images, for messages.

    Raises:
        UserError: an image is missing in all places.
    """
    # search the places in turn
    listings: dict[str, frozenset[str]] = {}
    searched: list[tuple[str, Sequence[str]]] = []
    paths: list[str] = []
    missing: Sequence[int] = ()
    for place, names in places:
        folder = os.fspath(place)
        if not searched:
            paths, missing = [""] * len(names), range(len(names))
        searched.append((folder, names))
        missing = _find_in_folder(folder, names, listings, paths, missing)
        if not missing:
            return ImageFiles(paths)

    # report the missing images, with the existing folders if there are any
    existing = [(folder, names) for folder, names in searched if Path(folder).is_dir()] or searched
    folder, names = existing[0]
    first = Path(folder, names[missing[0]])
    folders = ", ".join(dict.fromkeys(folder for folder, _ in existing))
    raise UserError(
        f"{source}: {len(missing):,} of the {len(paths):,} images are missing, the first is {first} (searched in "
        f"{folders}); give their folder as --image_dir"
    )


def _find_in_folder(
    folder: str,
    names: Sequence[str],
    listings: dict[str, frozenset[str]],
    paths: list[str],
    missing: Sequence[int],
) -> list[int]:
    """Set the paths of the missing images that `folder` holds; return the indices of the others."""
    still_missing: list[int] = []
    parents: dict[str, str] = {}  # one Path per folder, not per image
    for i in missing:
        subfolder, file = os.path.split(names[i])
        if subfolder not in parents:
            parent = parents[subfolder] = str(Path(folder, subfolder))
            if parent not in listings:
                listings[parent] = _list_names(parent)
        parent = parents[subfolder]
        if file in listings[parent]:
            paths[i] = f"{parent}{os.sep}{file}"
        else:
            still_missing.append(i)
    return still_missing


def _list_names(folder: str) -> frozenset[str]:
    """List the names in a folder; none if it is missing, or its name is invalid."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries)
    except ValueError:  # a NUL, or half a surrogate pair
        return frozenset()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
            return frozenset()
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from None
