"""The photographs of a folder and its subfolders."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from clip_retrieval.classification.folder import IMAGE_SUFFIXES
from clip_retrieval.errors import UserError, describe
from clip_retrieval.files import is_clutter

Stamp = tuple[int, int]
"""Size in bytes and time of the last change (ns) of a file."""


@dataclass
class Listing:
    """The photographs of a folder.

    Attributes:
        stamps: the stamp of each file, by its path relative to the folder, sorted.
        unreadable: folders that could not be listed, relative to the folder, with the reason.
        others: number of files without an image suffix.
    """

    stamps: dict[str, Stamp] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    others: int = 0


def list_photos(folder: Path) -> Listing:
    """List the image files of a folder, recognised by suffix, and of its subfolders.

    Files and folders of systems and editors are ignored. Links are followed; a folder that several links reach is
    listed once. Raises UserError if `folder` is not a folder or cannot be listed.
    """
    if not folder.is_dir():
        problem = "not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {problem}; give the folder of the photographs")
    listing = Listing()
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        place = waiting.pop()
        try:
            subfolders = sorted(_list_folder(folder, place, seen, listing), reverse=True)
        except OSError as error:
            if not place:
                raise UserError(f"{folder}: cannot be listed ({describe(error)}); check its permissions") from None
            listing.unreadable[place] = describe(error)
            continue
        waiting += subfolders
    listing.stamps = dict(sorted(listing.stamps.items()))
    return listing


def _list_folder(folder: Path, place: str, seen: set[tuple[int, int]], listing: Listing) -> Iterator[str]:
    """Add the files of the subfolder `place` to the listing; yield its subfolders, unless it was seen before."""
    path = folder / place
    found = path.stat()
    if (found.st_dev, found.st_ino) in seen:  # links can form a cycle
        return
    seen.add((found.st_dev, found.st_ino))
    with os.scandir(path) as entries:
        for entry in entries:
            name = f"{place}/{entry.name}" if place else entry.name
            if is_clutter(entry.name):
                continue
            if entry.is_dir():
                yield name
            elif os.path.splitext(entry.name)[1].lower() not in IMAGE_SUFFIXES:  # noqa: PTH122
                listing.others += 1
            else:
                try:
                    stamp = entry.stat()
                    listing.stamps[name] = (stamp.st_size, stamp.st_mtime_ns)
                except OSError:  # a broken link, or deleted in this moment
                    listing.others += 1


def is_below(name: str, folders: dict[str, str]) -> bool:
    """Whether a relative path is in one of the folders."""
    return any(name.startswith(f"{folder}/") for folder in folders)


def digest(content: bytes) -> str:
    """Return a 128-bit hash of a file, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()
