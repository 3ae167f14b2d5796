"""The photographs of a folder and its subfolders."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from clip_retrieval.classification.folder import list_images
from clip_retrieval.errors import UserError

Stamp = tuple[int, int]
"""Size in bytes and time of the last change (ns) of a file."""


@dataclass(frozen=True)
class Listing:
    """The photographs of a folder: their stamps by path relative to it; folders that could not be listed, with the
    reason; and the number of files that are not images.
    """

    stamps: dict[str, Stamp]
    unreadable: dict[str, str]
    others: int

    def may_hold(self, name: str) -> bool:
        """Whether a file may be in a folder that could not be listed."""
        return any(name.startswith(f"{folder}{os.sep}") for folder in self.unreadable)


def list_photos(folder: Path) -> Listing:
    """List the image files, recognised by suffix, without the clutter of systems and editors; links are followed.

    Raises UserError if `folder` is not a folder, cannot be listed, or holds no images.
    """
    if not folder.is_dir():
        problem = "not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {problem}; give the folder of the photographs")
    errors: list[OSError] = []
    images, others = list_images(folder, on_error=errors.append)
    stamps, prefix = {}, len(os.path.join(folder, ""))  # noqa: PTH118
    for path in map(str, images):
        try:
            found = os.stat(path)  # noqa: PTH116
        except OSError:  # a broken link
            continue
        stamps[path[prefix:]] = (found.st_size, found.st_mtime_ns)
    unreadable = {str(error.filename)[prefix:]: error.strerror or "" for error in errors}
    if "" in unreadable:
        raise UserError(f"{folder}: cannot be listed ({unreadable['']}); check its permissions")
    if not stamps:
        raise UserError(f"{folder}: holds no images; is its drive connected?")
    return Listing(stamps, unreadable, len(others))


def digest(content: bytes) -> str:
    """Return a 128-bit hash of a file, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()
