"""Find the tar shards of a split: expand patterns, search folders, and check each file before a run starts.

--train_data 'shards/{00000..01537}.tar' --val_data 'val/*.tar'
--train_data 'https://HOST/{00000..01537}.tar' --val_data 's3://BUCKET/val/*.tar'
DATA/train-{0000..0099}.tar, DATA/cc3m-val-0.tar, DATA/test.tar    or  DATA/train/*.tar, DATA/valid/*.tar, ...
DATA/*.tar                                                     without splits: all are training data

Patterns are separated by blanks, or by SEPARATOR if they contain blanks.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clip_retrieval.data.dataset import SPLITS, UNSPLIT
from clip_retrieval.data.shards.braces import expand_braces
from clip_retrieval.data.shards.remote import Url, check_protocol, is_url, list_store
from clip_retrieval.data.shards.sources import Place, open_shard
from clip_retrieval.errors import UserError
from clip_retrieval.files import check_root, is_clutter
from clip_retrieval.options import DatasetOptions

SEPARATOR = "::"
_SPLIT_WORD = re.compile(rf"(?<![A-Za-z])({'|'.join(SPLITS)})(?![A-Za-z])")
TARS = ("*.tar", "*.tar.gz", "*.tgz")


@dataclass(frozen=True)
class SplitShards:
    """The shards of a split.

    Attributes:
        split: "train", "val" or "test", or UNSPLIT.
        paths: the files and addresses, each once, in the order of the pattern or of their names.
    """

    split: str
    paths: list[Place]


def find_shards(options: DatasetOptions, split: str) -> SplitShards | None:
    """Find the shards of a split; None if it has none.

    Raises UserError if a pattern matches no shard, or a shard is missing or is not a complete tar.
    """
    named = {"train": options.train_data, "val": options.val_data}.get(split)
    found = SplitShards(split, expand_patterns(named, f"--{split}_data")) if named else _find_in_root(options, split)
    if found is None:
        return None
    for path in found.paths:
        if isinstance(path, Path):
            check_whole(path)
    return found


def _split_patterns(text: str, source: str) -> list[str]:
    """Split an option's value at SEPARATOR, else at blanks, unless the whole value matches files."""
    if SEPARATOR in text:
        return [pattern.strip() for pattern in text.split(SEPARATOR) if pattern.strip()]
    patterns = text.split()
    if patterns != [text] and any(_glob(name) for name in expand_braces(text, source)):
        return [text]
    return patterns


def absolute_patterns(text: str) -> str:
    """Make patterns independent of the working directory; a value that names no tars is one path, with its blanks."""
    if not _is_tar_pattern(text):
        return str(Path(text).absolute())
    patterns = _split_patterns(text, text)
    return SEPARATOR.join(name if is_url(name) else str(Path(name).absolute()) for name in patterns)


def _is_tar_pattern(text: str) -> bool:
    if ".tar" in text or SEPARATOR in text or is_url(text):
        return True
    if glob.has_magic(text):  # unless it is a folder, or the prefix of files, with brackets in its name
        return not Path(text).exists() and not glob.glob(f"{glob.escape(text)}_*")  # noqa: PTH207
    return not Path(text).exists() and all(_list_tars(Path(folder)) for folder in text.split())


def expand_patterns(text: str, option: str) -> list[Place]:
    """Expand patterns with braces and wildcards to files and addresses; a folder expands to its tars.

    Raises UserError, naming `option` and the missing file or folder, if anything is missing. Addresses without
    wildcards are not requested.
    """
    paths: list[Place] = []
    for pattern in _split_patterns(text, f"{option} {text}"):
        for name in expand_braces(pattern, f"{option} {text}"):
            if found := _find_remote(name, f"{option} {text}") if is_url(name) else _find_files(name):
                paths += found
            elif Path(name).is_dir() or glob.has_magic(name) or is_url(name):
                raise UserError(f"{option} {text}: no shards in {name}; correct the pattern, or add the files")
            else:
                raise UserError(f"{option} {text}: shard {name} is missing; fetch it, or correct the pattern")
    if not paths:
        raise UserError(f"{option} {text!r}: names no shards; give a pattern like 'shards/{{00000..00099}}.tar'")
    return list(dict.fromkeys(paths))


def _find_remote(address: str, source: str) -> list[Url]:
    """Find the shards of an address: itself, or the matches of wildcards if the store can list them."""
    check_protocol(address, source)
    return list_store(address, source) if "*" in address or "[" in address else [Url(address)]


def _find_files(name: str) -> list[Path]:
    """Find the files of a name: the file itself, the tars of a folder, or the matches of wildcards."""
    path = Path(name)
    if path.is_file():
        return [path]
    return _list_tars(path) if path.is_dir() else _glob(name)


def _glob(pattern: str) -> list[Path]:
    """Find the matches of a pattern. Folders that exist under the very name in it (`shards [1]`) are no patterns."""
    parts = Path(pattern).parts
    existing = next((i for i in range(len(parts), 0, -1) if os.path.isdir(Path(*parts[:i]))), 0)  # noqa: PTH112
    escaped = Path(*map(glob.escape, parts[:existing]), *parts[existing:])
    return sorted(map(Path, glob.glob(str(escaped)))) if parts else []  # noqa: PTH207  takes absolute patterns


def _find_in_root(options: DatasetOptions, split: str) -> SplitShards | None:
    """Find the shards of a split in the root, without those that an option gives to another split."""
    root = Path(options.dataset_root)
    if (root / options.name).is_dir():  # simple-clip's datasets/yfcc7m
        root = root / options.name
    named = options.train_data or options.val_data
    if not named:
        check_root(root)
    elif not root.is_dir():
        return None
    taken = _resolve_patterns(options.train_data) if split != "train" else _resolve_patterns(options.val_data)
    of_split = {name: list(_find_split_tars(root, name, strict=not named)) for name in ("train", "val", "test")}
    if any(of_split.values()):
        return _exclude(SplitShards(split, [*of_split[split]]), taken)
    # no name has a split's word: all tars are training data, except those that an option gives to another split
    tars = _list_tars(root)
    if named:
        return _exclude(SplitShards(split, [*tars]), taken) if split == "train" else None
    if not tars:
        raise UserError(
            f"{root}: contains no .tar shards; give their folder as --dataset_root, or patterns as --train_data and "
            "--val_data"
        )
    return None if split == "val" else SplitShards(UNSPLIT, [*tars])


def _resolve_patterns(patterns: str | None) -> set[Path]:
    """Find the existing files of patterns."""
    if not patterns:
        return set()
    names = (name for pattern in _split_patterns(patterns, patterns) for name in expand_braces(pattern, patterns))
    return {path.resolve() for name in names if not is_url(name) for path in _find_files(name)}


def _exclude(found: SplitShards, taken: set[Path]) -> SplitShards | None:
    paths = [path for path in found.paths if isinstance(path, Path) and path.resolve() not in taken]
    return SplitShards(found.split, [*paths]) if paths else None


def _find_split_tars(root: Path, split: str, *, strict: bool) -> Iterator[Path]:
    """Find the tars of `root` with the split's word in their names, and all tars in folders of that name.

    A name with the words of several splits belongs to none; with strict=True it raises UserError.
    """
    for path in _list_tars(root):
        words = {SPLITS[word] for word in _SPLIT_WORD.findall(path.stem)}
        if (match := _SPLIT_WORD.match(path.stem)) is not None:  # a word at the start of the name decides
            words = {SPLITS[match[1]]}
        if strict and len(words) > 1:
            raise UserError(
                f"{path}: its name has the words of several splits ({' and '.join(sorted(words))}); start it with its "
                "split, or give patterns as --train_data and --val_data"
            )
        if words == {split}:
            yield path
    for name, of in SPLITS.items():
        if of == split and (root / name).is_dir():
            yield from _list_tars(root / name)


def _list_tars(folder: Path) -> list[Path]:
    return sorted(path for tars in TARS for path in folder.glob(tars) if not is_clutter(path.name))


def check_whole(path: Path) -> None:
    """Raise UserError unless the file has the first and the last bytes of a tar: a cheap check before a run starts.

    Of a compressed file, only the first bytes are checked.
    """
    # read both ends
    with open_shard(path) as source:
        header, end, size = source.read_at(0, tarfile.BLOCKSIZE), bytes(2 * tarfile.BLOCKSIZE), source.size or 0
        if source.size is not None:
            end = source.read_at(max(0, size - len(end)), len(end))
    # the beginning: a header
    try:
        tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        if header and not header.strip(b"\0"):
            raise UserError(f"{path}: contains no samples; remove it from the pattern") from None
        raise UserError(f"{path}: not a tar; fetch it again, or remove it from the pattern") from None
    # the end: two blocks of zeros
    if size % tarfile.BLOCKSIZE or end.strip(b"\0") or len(end) < 2 * tarfile.BLOCKSIZE:
        raise UserError(f"{path}: incomplete tar, its end is missing; fetch it again")
