"""Images in files, found in the folders that may hold them."""

from __future__ import annotations

import contextlib
import errno
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clip_retrieval.data.captions import SURROGATES
from clip_retrieval.data.images.decode import decode_rgb, make_missing_error, read_encoded
from clip_retrieval.errors import UserError, describe, format_share


class ImageFiles:
    """Image files, opened with Pillow and converted to RGB as its `convert` does (grey, palette, CMYK).

    Args:
        paths: the files.
        names: their names in the file that lists them; the paths by default.
        missing: the images whose files do not exist.
    """

    def __init__(self, paths: Sequence[str], names: Sequence[str] | None = None, missing: Sequence[int] = ()):
        self.paths = paths
        self.names = paths if names is None else names
        self.missing = missing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Image.Image:
        return decode_rgb(self.paths[index], self.paths[index])

    def name(self, index: int) -> str:
        return self.paths[index]

    def key(self, index: int) -> str:
        """The name of an image in the file that lists it, in the spelling that all systems share."""
        return common_spelling(self.names[index])

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


def common_spelling(name: str) -> str:
    """Return an image's name with slashes, composed Unicode, and without `./` and `x/../`."""
    return os.path.normpath(unicodedata.normalize("NFC", name.replace("\\", "/")))


def find_image_files(
    places: Iterable[tuple[str | Path, Sequence[str]]], source: str | Path, *, skip_missing: bool = False
) -> ImageFiles:
    """Find the image files of a data set, each in the first place that holds it.

    Each folder is listed once instead of checking each file: a hundred thousand images take a fraction of a second,
    also on a network drive. Later places are searched only for images that are still missing. Images that no place
    holds are searched again in the spellings of other systems; see `_find_respelled`.

    Args:
        places: (folder, names) for each way in which the images may be stored; image i is names[i] everywhere. A name
            may contain subfolders, or be absolute.
        source: the file that names the images, for messages.
        skip_missing: record missing images in the result instead of raising, unless all are missing.

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
            return ImageFiles(paths, searched[0][1])
    for folder, names in searched:
        missing = _find_respelled(folder, names, paths, missing)
    if not missing:
        return ImageFiles(paths, searched[0][1])

    # the missing images, with the existing folders if there are any
    existing = [(folder, names) for folder, names in searched if Path(folder).is_dir()] or searched
    folder, names = existing[0]
    if skip_missing and len(missing) < len(paths):
        for i in missing:
            paths[i] = str(Path(folder, names[i]))
        return ImageFiles(paths, searched[0][1], missing)
    first = Path(folder, names[missing[0]])
    folders = ", ".join(dict.fromkeys(folder for folder, _ in existing))
    remedy = " or skip them with --skip_broken" if len(missing) < len(paths) else ""
    raise UserError(
        f"{source}: {format_share(len(missing), len(paths), 'image')} missing, the first is {first} (searched in "
        f"{folders}); give their folder as --image_dir{remedy}"
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


def _find_respelled(folder: str, names: Sequence[str], paths: list[str], missing: Sequence[int]) -> list[int]:
    """Set the paths of missing images whose names differ from those in `folder` by the system that wrote them.

    Backslashes separate folders, Unicode is composed (Linux, Windows) or decomposed (macOS), and a name on the disk
    that is not UTF-8 is Latin-1. Return the indices of the others.
    """
    still_missing: list[int] = []
    listings: dict[str, dict[str, str]] = {}
    parents: dict[str, str | None] = {}
    for i in missing:
        parent, slash, file = names[i].replace("\\", "/").rpartition("/")
        if parent not in parents:
            place: str | None = "/" if slash and not parent else folder
            for part in Path(parent).parts:
                place = place and _find_entry(place, part, listings)
            parents[parent] = place
        place = parents[parent]
        path = _find_entry(place, file, listings) if place and file else None
        if path:
            paths[i] = path
        else:
            still_missing.append(i)
    return still_missing


def _find_entry(folder: str, name: str, listings: dict[str, dict[str, str]]) -> str | None:
    """Find a file or folder in `folder` by its name or another spelling of it."""
    path = os.path.join(folder, name)  # noqa: PTH118
    try:
        if os.path.lexists(path):
            return path
    except ValueError:  # a NUL, or half a surrogate pair
        return None
    if folder not in listings:
        listings[folder] = {_respell(entry): entry for entry in sorted(_list_names(folder))}
    entry = listings[folder].get(_respell(name))
    return entry and os.path.join(folder, entry)  # noqa: PTH118


def _respell(name: str) -> str:
    """Return the spelling of a name that all systems share: Unicode, composed."""
    if SURROGATES.search(name):  # bytes that are not UTF-8
        with contextlib.suppress(UnicodeEncodeError):
            name = os.fsencode(name).decode("latin-1")
    return unicodedata.normalize("NFC", name)


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
