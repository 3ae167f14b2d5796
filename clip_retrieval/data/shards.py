"""Which tar shards a split has: patterns expanded, folders searched, each file looked at before anything begins.

--train_data 'shards/{00000..01537}.tar' --val_data 'val/*.tar'
DATA/train-{0000..0099}.tar, DATA/val-0.tar, DATA/test.tar     or  DATA/train/*.tar, DATA/valid/*.tar, ...
DATA/*.tar                                                     without splits: all are to train on
"""

from __future__ import annotations

import glob
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from clip_retrieval.data.dataset import UNSPLIT
from clip_retrieval.data.readers import files
from clip_retrieval.errors import UserError
from clip_retrieval.options import DataOptions

SIZES = "sizes.json"
_OF_A_SPLIT = re.compile(rf"({'|'.join(sorted(files.SPLITS, key=len, reverse=True))})([^A-Za-z].*)?\.tar")
_GZIP = b"\x1f\x8b"


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
    """The patterns of one option: what blanks divide, unless files match it with its blanks."""
    if any(_matches(name) for name in _braces_expanded(text, where)):
        return [text]
    return text.split()


def absolute_patterns(text: str) -> str:
    """The same patterns, to be used from any working directory; what names no tars is one path, blanks and all."""
    patterns = _split_patterns(text, text) if ".tar" in text or glob.has_magic(text) else [text]
    return " ".join(str(Path(pattern).absolute()) for pattern in patterns)


def expand(text: str, option: str) -> list[Path]:
    """The files that patterns with braces and wildcards name; a folder stands for its tars.

    Raises UserError, naming `option` and what is not there, where anything is not there.
    """
    paths: list[Path] = []
    for pattern in _split_patterns(text, f"{option} {text}"):
        for name in _braces_expanded(pattern, f"{option} {text}"):
            path = Path(name)
            if path.is_file():
                paths.append(path)
            elif found := _tars(path) if path.is_dir() else _matches(name):
                paths += found
            elif path.is_dir() or glob.has_magic(name):
                raise UserError(f"{option} {text}: {name} holds no shards; correct the pattern, or bring the files")
            else:
                raise UserError(f"{option} {text}: there is no shard {name}; fetch it, or correct the pattern")
    if not paths:
        raise UserError(f"{option} {text!r} names no shards; give a pattern like 'shards/{{00000..00099}}.tar'")
    return list(dict.fromkeys(paths))


def _braces_expanded(pattern: str, where: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{where}: the braces do not fit ({error}); write {{00000..00099}}") from None


def _matches(pattern: str) -> list[Path]:
    return sorted(map(Path, glob.glob(pattern)))  # noqa: PTH207  a Path's own takes no absolute pattern


def _in_root(options: DataOptions, split: str) -> SplitShards | None:
    root = Path(options.dataset_root)
    if (root / options.dataset).is_dir():  # simple-clip's datasets/yfcc7m
        root = root / options.dataset
    named = options.train_data or options.val_data
    if not named:
        files.check_root(root)
    elif not root.is_dir():
        return None
    of_split = {name: list(_of_split(root, name)) for name in ("train", "val", "test")}
    if any(of_split.values()):
        return SplitShards(split, of_split[split]) if of_split[split] else None
    everything = _tars(root)
    if named:  # it has the split that is not named, and that is the one to train on
        return SplitShards(split, everything) if everything and split == "train" else None
    if not everything:
        raise UserError(
            f"{root}: holds no .tar shards; give their folder as --dataset_root, or patterns as --train_data and "
            "--val_data"
        )
    return None if split == "val" else SplitShards(UNSPLIT, everything)


def _of_split(root: Path, split: str) -> Iterator[Path]:
    """Tars of `root` whose names begin with a word for the split, and all that are in folders named so."""
    for path in _tars(root):
        if (match := _OF_A_SPLIT.fullmatch(path.name)) and files.SPLITS[match[1]] == split:
            yield path
    for name, of in files.SPLITS.items():
        if of == split and (root / name).is_dir():
            yield from _tars(root / name)


def _tars(folder: Path) -> list[Path]:
    # Archives made on macOS bring a ._file along with every file.
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def check_whole(path: Path) -> None:
    """Raise UserError unless the file begins as a tar does and ends as one does: cheap, and before a run begins."""
    try:
        with path.open("rb") as file:
            header = file.read(tarfile.BLOCKSIZE)
            size = file.seek(0, 2)
            file.seek(max(0, size - 2 * tarfile.BLOCKSIZE))
            end = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        if header and not header.strip(b"\0"):
            raise UserError(f"{path}: holds no samples; take it out of the pattern") from None
        mend = "decompress it" if header.startswith(_GZIP) else "fetch it again, or take it out of the pattern"
        raise UserError(f"{path}: not a tar; {mend}") from None
    if size % tarfile.BLOCKSIZE or end.strip(b"\0") or len(end) < 2 * tarfile.BLOCKSIZE:
        raise UserError(f"{path}: only a part of a tar, its end is missing; fetch it again")


def known_sizes(paths: Sequence[Path]) -> list[int | None]:
    """Samples of each shard as the `sizes.json` beside it has them, {file name: samples}; None where it does not."""
    tables: dict[Path, dict] = {}
    found: list[int | None] = []
    for path in paths:
        source = path.parent / SIZES
        if source not in tables:
            tables[source] = files.read_json(source) if source.is_file() else {}
            if not isinstance(tables[source], dict):
                raise UserError(f"{source}: not a table of samples by shard; mend it, or take it away")
        size = tables[source].get(path.name)
        if size is not None and not _is_count(size):
            raise UserError(f"{source}: {path.name} has {json.dumps(size)} samples; mend it, or take it away")
        found.append(None if size is None else int(size))
    return found


def _is_count(size: object) -> bool:
    return (type(size) is int and size >= 0) or (isinstance(size, str) and size.isascii() and size.isdecimal())
