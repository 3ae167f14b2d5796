"""What the classes of a data set are called, by folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from clip_retrieval.data.readers.files import read_json, read_text
from clip_retrieval.errors import UserError

BLANK = r"\s"
# What may stand between a folder and its name, and the share of the folders that must be named so: a blank is common
# within names.
SEPARATORS = {r"\t": 0, ",": 0, BLANK: 1 / 2}
HEADER = {"folder", "directory", "class", "class_id", "id", "label", "wnid", "wordnet_id", "synset"}
"""What a first line calls the folders, where it says what the columns are."""
DIGIT = re.compile(r"\d")
NUMBERED = re.compile(r"\d+\s+(?=\S)")  # `n02119789 1 kit_fox`, as in ImageNet's map_clsloc.txt


def spaced(name: str) -> str:
    """A name as it is written in a sentence."""
    return " ".join(name.replace("_", " ").split())


def read_class_names(path: Path, folders: Sequence[str]) -> dict[str, str]:
    """Folder to name, from a text file (.txt, .csv, ...) or a .json.

    A text file has a line per class, blank ones apart: the name alone, in the order of `folders`, or the folder, then
    a tab, a comma or blanks, then the name (where all lines have a number in front of it, that is left out). Blanks
    count only behind folders that are ids, each with a digit in it, as n02119789 is: names have blanks in them. Above
    folders and names a header may stand. A JSON file is a list of names, or an object from folder to name. A file with
    folders may name more of them than there are.

    Args:
        path: the file.
        folders: the folders of the classes, in their order.

    Raises:
        UserError: the file cannot be read, or holds a list with another number of names than there are folders.
    """
    content = _content(path)
    names = content if isinstance(content, dict) else _mapping(path, content, frozenset(folders)) or _texts(content)
    if isinstance(names, list):
        if len(names) != len(folders):
            raise UserError(
                f"{path}: names {len(names):,} classes, but there are {len(folders):,} ({_few(folders)}); give one for "
                "each, in this order, or lines of folder, comma, name"
            )
        names = dict(zip(folders, names))
    return {folder: spaced(name) for folder, name in names.items()}


def read_names(path: Path) -> list[str]:
    """The class names of a text file with one per line, or of a .json. Raises UserError where there are none."""
    content = _content(path)
    names = content.values() if isinstance(content, dict) else _texts(content)
    return [spaced(name) for name in names]


def _content(path: Path) -> dict[str, str] | list[tuple[int, str]]:
    """Folder to name, or numbered lines."""
    if path.suffix.lower() != ".json":
        found = [(number, text.strip()) for number, text in enumerate(read_text(path).splitlines(), 1) if text.strip()]
    else:
        found = read_json(path)
        names = list(found.values()) if isinstance(found, dict) else found
        if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
            raise UserError(f"{path}: expected a JSON list of class names, or an object from folder to name")
        if isinstance(found, list):
            found = list(enumerate(found, 1))
    if not found:
        raise UserError(f"{path}: names no classes")
    return found


def _texts(lines: Sequence[tuple[int, str]]) -> list[str]:
    return [text for _, text in lines]


def _mapping(path: Path, lines: Sequence[tuple[int, str]], folders: frozenset[str]) -> dict[str, str]:
    """Folder to name; empty where the lines are names only."""
    for separator, least in SEPARATORS.items():
        pattern = re.compile(rf"\s*{separator}\s*")
        parts = [(number, *pattern.split(text, maxsplit=1)) for number, text in lines]
        if parts[0][1].lower() in HEADER and parts[0][1] not in folders:
            del parts[0]
        named = [part for part in parts if len(part) == 3]
        found = folders & {part[1] for part in named}
        if separator == BLANK and not all(map(DIGIT.search, found)):
            continue
        if 2 * len(named) >= len(parts) and len(found) >= max(1, least * len(folders)):
            break
    else:
        return {}
    numbered = all(NUMBERED.match(part[2]) for part in named)
    names: dict[str, str] = {}
    for number, folder, *rest in parts:
        name = NUMBERED.sub("", rest[0], count=1) if rest and numbered else "".join(rest)
        if not name:
            raise UserError(f'{path}, line {number}: no name for "{folder}"; write folder, comma, name')
        if names.setdefault(folder, name) != name:
            raise UserError(f'{path}, line {number}: "{folder}" has another name before; take one of them out')
    return names


@cache
def imagenet_names() -> dict[str, str]:
    """WordNet id to name of ImageNet's 1,000 classes, in their order: the names that CLIP's published values use."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo().label_names(), IMAGENET_CLASSNAMES, strict=True))


def imagenet_folder_names(
    folders: Sequence[str], *, root_option: str = "--data_root", names_option: str = "--class_names"
) -> dict[str, str]:
    """Folder to name, of ImageNet or a variant of it: folders are WordNet ids (ImageNet, -A, -R, -Sketch) or the
    classes' numbers from 0 (ImageNetV2).

    Raises UserError, naming the two options that may mend it, for any other folder.
    """
    names = imagenet_names()
    numbered = {str(number): name for number, name in enumerate(names.values())}
    known = numbered if numbered.keys() >= set(folders) else names
    unknown = next((folder for folder in folders if folder not in known), None)
    if unknown is None:
        return known
    raise UserError(
        f'the folder "{unknown}" is none of ImageNet\'s classes (n01440764, ..., or 0 to 999); give the folder that '
        f"holds these as {root_option}, or name the classes with {names_option}"
    )


def _few(folders: Sequence[str]) -> str:
    return ", ".join(folders[:3]) + (", ..." if len(folders) > 3 else "")
