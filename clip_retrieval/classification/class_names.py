"""Class names of a data set, by folder."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from clip_retrieval.data.captions import mend_characters
from clip_retrieval.errors import UserError, format_count
from clip_retrieval.files import read_json, read_text
from clip_retrieval.log import log

# Separators between a folder and its name, in order of preference. Names often contain blanks, so BLANK counts only
# after folders that are ids, and only if it separates most folders from their names.
# (No \s* before a delimiter: many blanks in a line would take quadratic time.)
TAB, COMMA, SIGN, BLANK = r"\t\s*", "[,，]", "[;:=]", r"\s+"
DELIMITERS = {TAB: "\t", COMMA: ",", SIGN: ";"}  # between quoted fields
HEADER = {"folder", "directory", "dir", "class", "category", "id", "label", "index", "idx", "wnid", "wordnet_id"}
HEADER |= {"synset", "folder_name", "class_name", "class_id", "name"}
"""Titles of the folder column in a header."""
NAMES = ("name", "class_name", "label_name", "words", "label", "class", "category")
"""Titles of the name column in a header."""
DIGIT = re.compile(r"\d")
NUMBERED = re.compile(r"\d+\s+(?=\S)")  # `n02119789 1 kit_fox`, as in ImageNet's map_clsloc.txt
POSITION = re.compile(r"(\d{1,9})[\s.,:;)]+(?=\S)")
WORD_ENDS = re.compile(r"[\s,;:=]+")
CODE = ("{", "[", '"', "'")


def clean_name(name: str) -> str:
    """The name as in a sentence: blanks for underscores, and only characters that can be tokenised."""
    return " ".join(mend_characters(name).replace("_", " ").split())


def read_class_names(path: Path, folders: Sequence[str]) -> dict[str, str]:
    """Read a map from folder to class name, from a text file (.txt, .csv, ...) or a .json.

    A text file has one class per line; empty lines are skipped. A line is either

    - the name alone, in the order of `folders`; consecutive line numbers before the names are dropped; or
    - the folder, a separator, and the name. The separator is a tab, a comma, one of ; : = or blanks. Blanks count only
      after folders that are ids with a digit, such as n02119789, because names contain blanks too. If every name
      follows a number, the numbers are dropped. A header is allowed, and with it further columns.

    A JSON file is a list of names, an object from folder to name, or Keras' object from number to [folder, name].
    A file with folders may name other folders too. A list that consists of the folders themselves names each folder
    after itself, in any order.

    Args:
        path: the file.
        folders: the class folders, in order.

    Raises UserError if the file cannot be read or has another format, or if a list has not one name per folder.
    """
    content = _read_content(path)
    if not isinstance(content, dict):
        content = _parse_mapping(path, content, folders) or _parse_list(path, content, folders)
    names = {folder: clean_name(name) for folder, name in content.items()}
    shown = ", ".join(f'{folder} is "{names[folder]}"' for folder in folders[:2] if folder in names)
    log.info(f"{path}: {shown}" + ", ..." * (len(folders) > 2))
    return names


def read_names(path: Path) -> list[str]:
    """Read the class names of a text file, one per line, or of a .json. Raises UserError if there are none."""
    content = _read_content(path)
    names = content.values() if isinstance(content, dict) else [text for _, text in content]
    return [clean_name(name) for name in names]


def _read_content(path: Path) -> dict[str, str] | list[tuple[int, str]]:
    """{folder: name}, or [(line number, line), ...]."""
    content: dict[str, str] | list[tuple[int, str]]
    if path.suffix.lower() != ".json":
        lines = enumerate(read_text(path).splitlines(), 1)
        content = [(number, text.strip()) for number, text in lines if text.strip()]
    else:
        loaded = read_json(path)
        if isinstance(loaded, dict) and all(key.isdigit() and _is_pair(value) for key, value in loaded.items()):
            loaded = dict(loaded.values())  # imagenet_class_index.json: {"0": ["n01440764", "tench"], ...}
        names = list(loaded.values()) if isinstance(loaded, dict) else loaded
        if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
            raise UserError(f"{path}: expected a JSON list of class names, or an object from folder to name")
        content = loaded if isinstance(loaded, dict) else list(enumerate(names, 1))
    if not content:
        raise UserError(f"{path}: names no classes")
    return content


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)


def _parse_list(path: Path, lines: Sequence[tuple[int, str]], folders: Sequence[str]) -> dict[str, str]:
    """{folder: name} from lines that are names alone, in the order of the folders."""
    names = [text for _, text in lines]
    if code := next((text for text in names if text.startswith(CODE)), None):
        raise UserError(f"{path}: {code[:40]} is not a class name; write one per line, or save a list as .json")
    # drop line numbers that start at 0 or 1
    matches = [match for name in names if (match := POSITION.match(name))]
    if len(matches) == len(names):
        numbers = [int(match[1]) for match in matches]
        if numbers[0] < 2 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            names = [name[match.end() :] for name, match in zip(names, matches)]
    if len(names) != len(folders):
        shown = ", ".join(folders[:3]) + ", ..." * (len(folders) > 3)
        raise UserError(
            f"{path}: names {format_count(len(names), 'class')}, but there are {len(folders):,} ({shown}); write one "
            "name for each, in this order, or lines of folder, comma, name"
        )
    # the folders themselves, in any order
    folder_of = {clean_name(folder): folder for folder in folders}
    if len(folder_of) == len(folders) and {clean_name(name) for name in names} == folder_of.keys():
        return {folder_of[clean_name(name)]: name for name in names}
    # refuse a mapping that was not recognised as one
    ids = {folder for folder in folders if DIGIT.search(folder) and not folder.isdigit()}
    if 2 * sum(not ids.isdisjoint(WORD_ENDS.split(name)) for name in names) > len(names):
        raise UserError(f'{path}: "{names[0]}" seems to hold folder and name; write lines of folder, comma, name')
    for folder, name in zip(folders, names):
        if folder_of.get(clean_name(name), folder) != folder:
            raise UserError(
                f'{path}: "{name}" is a folder, but its position makes it the name of the folder "{folder}"; write '
                "lines of folder, comma, name"
            )
    return dict(zip(folders, names))


def _parse_mapping(path: Path, lines: Sequence[tuple[int, str]], folders: Sequence[str]) -> dict[str, str]:
    """{folder: name} from lines with both; empty if the lines are names alone."""
    known = frozenset(folders)
    # find the separator, and the columns of folders and names
    for separator in (TAB, COMMA, SIGN, BLANK):
        rows = [(number, _split_fields(text, separator)) for number, text in lines]
        header = rows[0][1] if _is_header(rows[0][1][0], known) else None
        rows = rows[1:] if header else rows
        key, name = _find_columns(header, rows, known)
        matches = known & {fields[key] for _, fields in rows if len(fields) > key}
        if separator == BLANK and (not all(map(DIGIT.search, matches)) or 2 * len(matches) < len(folders)):
            continue
        if matches and 2 * sum(len(fields) > 1 for _, fields in rows) >= len(rows):
            break
    else:
        return {}
    if header and name < 0:
        raise UserError(f"{path}: none of its columns ({', '.join(header)}) is called name; rename the one with names")
    # without further columns, the name is the rest of the line
    if header is None or len(header) < 3:
        rows = [(number, _split_fields(text, separator, 1)) for number, text in lines[1 if header else 0 :]]
        key, name = 0, 1
    # collect the names
    numbered = all(NUMBERED.match(fields[name]) for _, fields in rows if len(fields) > name)
    names: dict[str, str] = {}
    for number, fields in rows:
        if len(fields) <= max(key, name) or not fields[name]:
            folder = fields[min(key, len(fields) - 1)]
            raise UserError(f'{path}, line {number}: no name for "{folder}"; write folder, comma, name')
        text = NUMBERED.sub("", fields[name], count=1) if numbered else fields[name]
        if names.setdefault(fields[key], text) != text:
            raise UserError(f'{path}, line {number}: "{fields[key]}" already has another name; remove one of them')
    return names


def _split_fields(text: str, separator: str, maxsplit: int = 0) -> list[str]:
    """The fields of a line; quoted text is one field. maxsplit as in `re.split`."""
    if separator in DELIMITERS and '"' in text:
        delimiter = DELIMITERS[separator]
        try:
            fields = next(csv.reader([text], delimiter=delimiter, skipinitialspace=True))
        except csv.Error:  # a field longer than csv's limit, so longer than any name
            return [text]
        if maxsplit and len(fields) > maxsplit:
            fields[maxsplit:] = [delimiter.join(fields[maxsplit:])]
        return [field.strip() for field in fields]
    return [field.strip() for field in re.split(separator, text, maxsplit=maxsplit)]


def _is_header(first: str, folders: frozenset[str]) -> bool:
    return first.lower() in HEADER and first not in folders


def _find_columns(
    header: Sequence[str] | None, rows: Sequence[tuple[int, Sequence[str]]], folders: frozenset[str]
) -> tuple[int, int]:
    """The columns of folders and names: the first two, unless a header has more (-1 if no title is in NAMES)."""
    if header is None or len(header) < 3:
        return 0, 1
    matches = [0] * len(header)
    for _, fields in rows:
        for i, field in enumerate(fields[: len(header)]):
            matches[i] += field in folders
    key = max(range(len(header)), key=matches.__getitem__)
    titles = [title.lower() if i != key else "" for i, title in enumerate(header)]
    return key, next((titles.index(name) for name in NAMES if name in titles), -1)


@cache
def imagenet_names() -> dict[str, str]:
    """{WordNet id: name} of ImageNet's 1,000 classes, in order: the names of CLIP's published values."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo().label_names(), IMAGENET_CLASSNAMES, strict=True))


def imagenet_folder_names(
    folders: Sequence[str], *, place: Path, root_option: str = "--data_root", names_option: str = "--class_names"
) -> dict[str, str]:
    """{folder: name} for ImageNet or a variant: folders are WordNet ids (ImageNet, -A, -R, -Sketch) or class numbers
    from 0 (ImageNetV2).

    Raises UserError, with both options as remedies, for any other folder.
    """
    names = imagenet_names()
    numbered = {str(number): name for number, name in enumerate(names.values())}
    known = numbered if numbered.keys() >= set(folders) else names
    unknown = next((folder for folder in folders if folder not in known), None)
    if unknown is None:
        return known
    raise UserError(
        f'{place}: the folder "{unknown}" is not a class of ImageNet (n01440764, ..., or 0 to 999); give the folder '
        f"that holds these as {root_option}, or name the classes with {names_option}"
    )


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
