"""Which tar shards a split has: patterns expanded, folders searched, each file looked at before anything begins.

--train_data 'shards/{00000..01537}.tar' --val_data 'val/*.tar'
DATA/train-{0000..0099}.tar, DATA/cc3m-val-0.tar, DATA/test.tar    or  DATA/train/*.tar, DATA/valid/*.tar, ...
DATA/*.tar                                                     without splits: all are to train on

Blanks divide patterns, or SEPARATOR does, where they hold blanks.
"""

from __future__ import annotations

import glob
import re
import reprlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braceexpand import alphabet, braceexpand

from clip_retrieval.data.dataset import SPLITS, UNSPLIT
from clip_retrieval.errors import UserError
from clip_retrieval.files import check_root, open_regular, read_json
from clip_retrieval.options import DataOptions

SIZES = "sizes.json"
SEPARATOR = "::"
_A_SPLIT = re.compile(rf"(?<![A-Za-z])({'|'.join(SPLITS)})(?![A-Za-z])")
_GZIP = b"\x1f\x8b"
# Braces: ranges of numbers and letters, how many names they may expand to, and how deep they may be nested.
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
_LETTERS = re.compile(r"[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?")
MOST_SHARDS, MOST_CHARACTERS = 10**6, 10**9
DEEPEST_BRACES = 50
SMALLEST_SAMPLE = 2 * tarfile.BLOCKSIZE  # bytes: the headers of an image and a caption


@dataclass(frozen=True)
class SplitShards:
    """The shards of a split.

    Attributes:
        split: "train", "val" or "test", or UNSPLIT.
        paths: the files, each once, in the order of the pattern or of their names.
    """

    split: str
    paths: list[Path]


def find_shards(options: DataOptions, split: str) -> SplitShards | None:
    """The shards of a split; None where there are none.

    Raises UserError where a pattern names no shard or one that is missing, or a shard is not a whole tar.
    """
    option = f"{split}_data"
    if named := {"train": options.train_data, "val": options.val_data}.get(split):
        found = SplitShards(split, expand(named, f"--{option}"))
    else:
        found = _in_root(options, split)
    if found is None:
        return None
    for path in found.paths:
        check_whole(path)
    return found


def _split_patterns(text: str, where: str) -> list[str]:
    """The patterns of one option: what SEPARATOR divides, else what blanks do, unless files match it whole."""
    if SEPARATOR in text:
        return [pattern.strip() for pattern in text.split(SEPARATOR) if pattern.strip()]
    patterns = text.split()
    if patterns != [text] and any(_matches(name) for name in _expand_braces(text, where)):
        return [text]
    return patterns


def absolute_patterns(text: str) -> str:
    """The same patterns, to be used from any working directory; what names no tars is one path, blanks and all."""
    if not _names_tars(text):
        return str(Path(text).absolute())
    return SEPARATOR.join(name for pattern in _split_patterns(text, text) for name in _absolute(pattern))


def _names_tars(text: str) -> bool:
    if ".tar" in text or SEPARATOR in text or glob.has_magic(text):
        return True
    return not Path(text).exists() and all(_tars(Path(folder)) for folder in text.split())


def _absolute(pattern: str) -> list[str]:
    """The pattern itself, made absolute; what its braces stand for, where only some of that is absolute already."""
    names = _expand_braces(pattern, pattern) if "{" in pattern else [pattern]
    mixed = not Path(pattern).is_absolute() and any(Path(name).is_absolute() for name in names)
    return [str(Path(name).absolute()) for name in (names if mixed else [pattern])]


def expand(text: str, option: str) -> list[Path]:
    """The files that patterns with braces and wildcards name; a folder stands for its tars.

    Raises UserError, naming `option` and what is not there, where anything is not there.
    """
    paths: list[Path] = []
    for pattern in _split_patterns(text, f"{option} {text}"):
        for name in _expand_braces(pattern, f"{option} {text}"):
            if found := _files(name):
                paths += found
            elif Path(name).is_dir() or glob.has_magic(name):
                raise UserError(f"{option} {text}: {name} holds no shards; correct the pattern, or bring the files")
            else:
                raise UserError(f"{option} {text}: there is no shard {name}; fetch it, or correct the pattern")
    if not paths:
        raise UserError(f"{option} {text!r} names no shards; give a pattern like 'shards/{{00000..00099}}.tar'")
    return list(dict.fromkeys(paths))


def _files(name: str) -> list[Path]:
    """The files that a name stands for: itself, the tars of a folder, or what wildcards match."""
    path = Path(name)
    if path.is_file():
        return [path]
    return _tars(path) if path.is_dir() else _matches(name)


def _expand_braces(pattern: str, where: str) -> list[str]:
    """The names that a pattern with braces expands to. Raises UserError if the braces do not match, or for too many."""
    try:
        number = _expansions(pattern)
        if number > MOST_SHARDS or number * len(pattern) > MOST_CHARACTERS:
            raise UserError(f"{where}: the braces expand to more than {MOST_SHARDS:,} shards; correct the numbers")
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{where}: the braces do not fit ({error}); write {{00000..00099}}") from None


def _expansions(pattern: str) -> int:
    """How many names `braceexpand` makes of a pattern, at most MOST_SHARDS + 1: counted without making them.

    Raises ValueError for deep nesting, which it is recursive in.
    """
    groups, begins = [[0, 1]], [0]  # of each open brace: names of its alternatives so far, of the current one
    for token in re.finditer(r"\\.|[{},]", pattern, re.DOTALL):
        if token[0] == "{":
            groups.append([0, 1])
            begins.append(token.end())
            if len(groups) > DEEPEST_BRACES:
                raise ValueError(f"more than {DEEPEST_BRACES} within each other")
        elif len(groups) > 1 and token[0] == ",":
            groups[-1] = [sum(groups[-1]), 1]
        elif len(groups) > 1 and token[0] == "}":
            number, begin = sum(groups.pop()), begins.pop()
            if numbers := _RANGE.fullmatch(pattern, begin, token.start()):
                first, last, step = (int(text or 1) for text in numbers.groups())
                number = abs(last - first) // (step or 1) + 1
            elif _LETTERS.fullmatch(pattern, begin, token.start()):
                number = len(alphabet)
            groups[-1][1] = min(groups[-1][1] * number, MOST_SHARDS + 1)
    return groups[0][1]


def _matches(pattern: str) -> list[Path]:
    return sorted(map(Path, glob.glob(pattern)))  # noqa: PTH207  a Path's own takes no absolute pattern


def _in_root(options: DataOptions, split: str) -> SplitShards | None:
    """The shards of a split in the root, without those that an option names for another one."""
    root = Path(options.dataset_root)
    if (root / options.name).is_dir():  # simple-clip's datasets/yfcc7m
        root = root / options.name
    named = options.train_data or options.val_data
    if not named:
        check_root(root)
    elif not root.is_dir():
        return None
    taken = _resolved(options.train_data) if split != "train" else _resolved(options.val_data)
    of_split = {name: list(_of_split(root, name, strict=not named)) for name in ("train", "val", "test")}
    if any(of_split.values()):
        return _without(SplitShards(split, of_split[split]), taken)
    everything = _tars(root)
    if named:  # it has the split that is not named, and that is the one to train on
        return _without(SplitShards(split, everything), taken) if split == "train" else None
    if not everything:
        raise UserError(
            f"{root}: holds no .tar shards; give their folder as --dataset_root, or patterns as --train_data and "
            "--val_data"
        )
    return None if split == "val" else SplitShards(UNSPLIT, everything)


def _resolved(patterns: str | None) -> set[Path]:
    """The files that patterns name, as far as they are there."""
    if not patterns:
        return set()
    names = (name for pattern in _split_patterns(patterns, patterns) for name in _expand_braces(pattern, patterns))
    return {path.resolve() for name in names for path in _files(name)}


def _without(found: SplitShards, taken: set[Path]) -> SplitShards | None:
    paths = [path for path in found.paths if path.resolve() not in taken]
    return SplitShards(found.split, paths) if paths else None


def _of_split(root: Path, split: str, *, strict: bool) -> Iterator[Path]:
    """Tars of `root` with a word for the split in their names, and all that are in folders named so.

    A name with words for several is of none; where that is `strict`, UserError is raised for it.
    """
    for path in _tars(root):
        words = {SPLITS[word] for word in _A_SPLIT.findall(path.stem)}
        if (match := _A_SPLIT.match(path.stem)) is not None:  # what the name begins with decides
            words = {SPLITS[match[1]]}
        if strict and len(words) > 1:
            raise UserError(
                f"{path}: its name has words for {' and '.join(sorted(words))}; begin it with the split, or give "
                "patterns as --train_data and --val_data"
            )
        if words == {split}:
            yield path
    for name, of in SPLITS.items():
        if of == split and (root / name).is_dir():
            yield from _tars(root / name)


def _tars(folder: Path) -> list[Path]:
    # Archives made on macOS bring a ._file along with every file.
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def check_whole(path: Path) -> None:
    """Raise UserError unless the file begins as a tar does and ends as one does: cheap, and before a run begins."""
    try:
        with open_regular(path) as file:
            header = file.read(tarfile.BLOCKSIZE)
            size = file.seek(0, 2)
            file.seek(max(0, size - 2 * tarfile.BLOCKSIZE))
            end = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        if header and not header.strip(b"\0"):
            raise UserError(f"{path}: holds no samples; take it out of the pattern") from None
        mend = "decompress it" if header.startswith(_GZIP) else "fetch it again, or take it out of the pattern"
        raise UserError(f"{path}: not a tar; {mend}") from None
    if size % tarfile.BLOCKSIZE or end.strip(b"\0") or len(end) < 2 * tarfile.BLOCKSIZE:
        raise UserError(f"{path}: only a part of a tar, its end is missing; fetch it again")


def known_sizes(paths: Sequence[Path]) -> list[int | None]:
    """Samples of each shard as the `sizes.json` beside it has them, {file name: samples}; None if it has none.

    Raises UserError if a number is none, or more than the shard can hold.
    """
    tables: dict[Path, dict] = {}
    found: list[int | None] = []
    for path in paths:
        source = path.parent / SIZES
        if source not in tables:
            tables[source] = read_sizes(source)
        size = tables[source].get(path.name)
        if size is not None and not _is_count(size, path):
            raise UserError(f"{source}: {path.name} has {reprlib.repr(size)} samples; mend it, or take it away")
        found.append(None if size is None else int(size))
    return found


def read_sizes(source: Path) -> dict[str, Any]:
    """What a `sizes.json` holds; nothing where there is none. Raises UserError unless it is a table."""
    table = read_json(source) if source.is_file() else {}
    if not isinstance(table, dict):
        raise UserError(f"{source}: not a table of samples by shard; mend it, or take it away")
    return table


def _is_count(size: object, shard: Path) -> bool:
    """Whether it is a number of samples that the shard can hold: memory is taken for so many."""
    if isinstance(size, str) and size.isascii() and size.isdecimal() and len(size) < 20:
        size = int(size)
    try:
        largest = shard.stat().st_size // SMALLEST_SAMPLE
    except OSError:
        return False
    return type(size) is int and 0 <= size <= largest
