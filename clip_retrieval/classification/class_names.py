"""What the classes of a data set are called, by folder."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from clip_retrieval.data.captions import mend_characters
from clip_retrieval.errors import UserError
from clip_retrieval.files import read_json, read_text
from clip_retrieval.log import log

# What may stand between a folder and its name: the first one that the lines have. Blanks are common within names: they
# count only behind folders that are ids, and where most folders are named so.
# (No blanks before a delimiter in these patterns: many blanks in a line would take quadratic time.)
TAB, COMMA, SIGN, BLANK = r"\t\s*", "[,，]", "[;:=]", r"\s+"
DELIMITERS = {TAB: "\t", COMMA: ",", SIGN: ";"}  # of fields in quotes
HEADER = {"folder", "directory", "dir", "class", "category", "id", "label", "index", "idx", "wnid", "wordnet_id"}
HEADER |= {"synset", "folder_name", "class_name", "class_id", "name"}
"""What a first line calls the folders, where it says what the columns are."""
NAMES = ("name", "class_name", "label_name", "words", "label", "class", "category")
"""What it calls the names."""
DIGIT = re.compile(r"\d")
NUMBERED = re.compile(r"\d+\s+(?=\S)")  # `n02119789 1 kit_fox`, as in ImageNet's map_clsloc.txt
POSITION = re.compile(r"(\d{1,9})[\s.,:;)]+(?=\S)")
WORD_ENDS = re.compile(r"[\s,;:=]+")
CODE = ("{", "[", '"', "'")


def clean_name(name: str) -> str:
    """A name as it is written in a sentence, in characters that can be tokenised."""
    return " ".join(mend_characters(name).replace("_", " ").split())


def read_class_names(path: Path, folders: Sequence[str]) -> dict[str, str]:
    """Folder to name, from a text file (.txt, .csv, ...) or a .json.

    A text file has a line per class, blank ones apart: the name alone, in the order of `folders` (numbers in front that
    count the lines are left out), or the folder, then a tab, a comma, one of ; : = or blanks, then the name (where all
    lines have a number in front of it, that is left out). Blanks count only behind folders that are ids, each with a
    digit in it, as n02119789 is: names have blanks in them. Above folders and names a header may stand, and with one
    there may be further columns. A JSON file is a list of names, an object from folder to name, or Keras' one from
    number to folder and name. A file with folders may name more of them than there are. A list of the folders
    themselves names each after itself, whatever its order.

    Args:
        path: the file.
        folders: the folders of the classes, in their order.

    Raises:
        UserError: the file cannot be read, holds a list with another number of names than there are folders, or seems
            to be something else.
    """
    content = _content(path)
    names = content if isinstance(content, dict) else _mapping(path, content, folders) or _list(path, content, folders)
    named = {folder: clean_name(name) for folder, name in names.items()}
    shown = ", ".join(f'{folder} is "{named[folder]}"' for folder in folders[:2] if folder in named)
    log.info(f"{path}: {shown}" + ", ..." * (len(folders) > 2))
    return named


def read_names(path: Path) -> list[str]:
    """The class names of a text file with one per line, or of a .json. Raises UserError where there are none."""
    content = _content(path)
    names = content.values() if isinstance(content, dict) else _texts(content)
    return [clean_name(name) for name in names]


def _content(path: Path) -> dict[str, str] | list[tuple[int, str]]:
    """Folder to name, or numbered lines."""
    if path.suffix.lower() != ".json":
        found = [(number, text.strip()) for number, text in enumerate(read_text(path).splitlines(), 1) if text.strip()]
    else:
        found = read_json(path)
        if isinstance(found, dict) and all(key.isdigit() and _is_pair(value) for key, value in found.items()):
            found = dict(found.values())  # imagenet_class_index.json: {"0": ["n01440764", "tench"], ...}
        names = list(found.values()) if isinstance(found, dict) else found
        if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
            raise UserError(f"{path}: expected a JSON list of class names, or an object from folder to name")
        if isinstance(found, list):
            found = list(enumerate(found, 1))
    if not found:
        raise UserError(f"{path}: names no classes")
    return found


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)


def _texts(lines: Sequence[tuple[int, str]]) -> list[str]:
    return [text for _, text in lines]


def _list(path: Path, lines: Sequence[tuple[int, str]], folders: Sequence[str]) -> dict[str, str]:
    """Folder to name, of lines that are names only, in the order of the folders."""
    names = _texts(lines)
    if code := next((text for text in names if text.startswith(CODE)), None):
        raise UserError(f"{path}: {code[:40]} is no name; write one per line, or save a list as .json")
    matches = [POSITION.match(name) for name in names]
    if all(matches) and [int(match[1]) for match in matches] in _counts(len(names)):
        names = [name[match.end() :] for name, match in zip(names, matches)]
    if len(names) != len(folders):
        raise UserError(
            f"{path}: names {len(names):,} classes, but there are {len(folders):,} ({_few(folders)}); give one for "
            "each, in this order, or lines of folder, comma, name"
        )
    own = {clean_name(folder): folder for folder in folders}
    if len(own) == len(folders) and {clean_name(name) for name in names} == own.keys():
        return {own[clean_name(name)]: name for name in names}
    ids = {folder for folder in folders if DIGIT.search(folder) and not folder.isdigit()}
    if 2 * sum(not ids.isdisjoint(WORD_ENDS.split(name)) for name in names) > len(names):
        raise UserError(f'{path}: "{names[0]}" seems to hold folder and name; write lines of folder, comma, name')
    for folder, name in zip(folders, names):
        if clean_name(name) in own and own[clean_name(name)] != folder:
            raise UserError(
                f'{path}: "{name}" is another folder than "{folder}", whose name it would be by its place; write lines '
                "of folder, comma, name"
            )
    return dict(zip(folders, names))


def _counts(number: int) -> list[list[int]]:
    return [list(range(number)), list(range(1, number + 1))]


def _mapping(path: Path, lines: Sequence[tuple[int, str]], folders: Sequence[str]) -> dict[str, str]:
    """Folder to name; empty where the lines are names only."""
    wanted = frozenset(folders)
    for separator in (TAB, COMMA, SIGN, BLANK):
        rows = [(number, _fields(text, separator)) for number, text in lines]
        header = rows[0][1] if _is_header(rows[0][1][0], wanted) else None
        rows = rows[1:] if header else rows
        key, name = _columns(header, rows, wanted)
        found = wanted & {fields[key] for _, fields in rows if len(fields) > key}
        if separator == BLANK and (not all(map(DIGIT.search, found)) or 2 * len(found) < len(folders)):
            continue
        if found and 2 * sum(len(fields) > 1 for _, fields in rows) >= len(rows):
            break
    else:
        return {}
    if name < 0:
        raise UserError(f"{path}: which of its columns ({', '.join(header)}) has the names? Call it name")
    if header is None or len(header) < 3:
        rows = [(number, _fields(text, separator, 1)) for number, text in lines[1 if header else 0 :]]
        key, name = 0, 1
    numbered = all(NUMBERED.match(fields[name]) for _, fields in rows if len(fields) > name)
    names: dict[str, str] = {}
    for number, fields in rows:
        if len(fields) <= max(key, name) or not fields[name]:
            folder = fields[min(key, len(fields) - 1)]
            raise UserError(f'{path}, line {number}: no name for "{folder}"; write folder, comma, name')
        text = NUMBERED.sub("", fields[name], count=1) if numbered else fields[name]
        if names.setdefault(fields[key], text) != text:
            raise UserError(f'{path}, line {number}: "{fields[key]}" has another name before; take one of them out')
    return names


def _fields(text: str, separator: str, most: int = 0) -> list[str]:
    """The fields of a line; what stands in quotes is one."""
    if separator in DELIMITERS and '"' in text:
        delimiter = DELIMITERS[separator]
        try:
            fields = next(csv.reader([text], delimiter=delimiter, skipinitialspace=True))
        except csv.Error:  # a field that is longer than any name
            return [text]
        joined = delimiter.join(fields[most:]) if most and len(fields) > most else None
        return [field.strip() for field in (fields if joined is None else [*fields[:most], joined])]
    return [field.strip() for field in re.split(separator, text, maxsplit=most)]


def _is_header(first: str, folders: frozenset[str]) -> bool:
    return first.lower() in HEADER and first not in folders


def _columns(
    header: Sequence[str] | None, rows: Sequence[tuple[int, Sequence[str]]], folders: frozenset[str]
) -> tuple[int, int]:
    """The columns of the folders and of the names: the first two, unless a header has more (-1: no name for names)."""
    if header is None or len(header) < 3:
        return 0, 1
    held = [0] * len(header)
    for _, fields in rows:
        for i, field in enumerate(fields[: len(header)]):
            held[i] += field in folders
    key = max(range(len(header)), key=held.__getitem__)
    titles = [title.lower() if i != key else "" for i, title in enumerate(header)]
    return key, next((titles.index(name) for name in NAMES if name in titles), -1)


@cache
def imagenet_names() -> dict[str, str]:
    """WordNet id to name of ImageNet's 1,000 classes, in their order: the names that CLIP's published values use."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo().label_names(), IMAGENET_CLASSNAMES, strict=True))


def imagenet_folder_names(
    folders: Sequence[str], *, place: Path, root_option: str = "--data_root", names_option: str = "--class_names"
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
        f'{place}: the folder "{unknown}" is none of ImageNet\'s classes (n01440764, ..., or 0 to 999); give the '
        f"folder that holds these as {root_option}, or name the classes with {names_option}"
    )


def _few(folders: Sequence[str]) -> str:
    return ", ".join(folders[:3]) + (", ..." if len(folders) > 3 else "")


CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"

STL10 = "airplane bird car cat deer dog horse monkey ship truck"

CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""

OFFICIAL_NAMES = {name: text.split() for name, text in (("cifar10", CIFAR10), ("cifar100", CIFAR100), ("stl10", STL10))}
