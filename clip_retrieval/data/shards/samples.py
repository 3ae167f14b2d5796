"""What is in a tar shard: members whose names differ in the ending only are one sample, as webdataset has it.

    00017.jpg  00017.txt  00017.json

The headers alone tell how many samples there are and where each begins.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from clip_retrieval.data.captions import clean_caption
from clip_retrieval.data.images.decode import check_encoded_size
from clip_retrieval.data.shards.tar_headers import Header, read_headers
from clip_retrieval.errors import UserError, describe
from clip_retrieval.files import open_regular
from clip_retrieval.log import log

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTION = "caption"  # its key in a .json, unless another one is given
LARGEST_TEXT = 2**24  # bytes of a .txt or .json
KEYS_SHOWN = 5  # of a .json, in messages
_ENDINGS = {*IMAGES, "txt", "json"}
_META = re.compile(r"__[^/]*__($|/)")


class Unusable(Exception):
    """What keeps a sample from being trained on."""


class Member(NamedTuple):
    """A file in a shard: its header's and its content's first byte, and the content's size in bytes."""

    key: str
    ending: str
    header: int
    begin: int
    size: int


def read_members(path: Path) -> Iterator[list[Member]]:
    """The members of each sample, from the headers alone.

    Raises UserError, naming the shard, if it is cut short or broken, or a member is too large.
    """
    with _open(path) as file:
        yield from _group(path, file)


def _group(path: Path, file: BinaryIO) -> Iterator[list[Member]]:
    for _, members in itertools.groupby(_iter_members(path, file), key=lambda member: member.key):
        yield list(members)


def _iter_members(path: Path, file: BinaryIO) -> Iterator[Member]:
    for header in read_headers(path, file):
        if _is_part(header.name):
            key, ending = key_and_ending(header.name)
            _check_size(header, ending, path)
            yield Member(key, ending, header.header, header.begin, header.size)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """A shard, for a block whose OSError is a UserError."""
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a tar ({describe(error)}); fetch it again") from None


def key_and_ending(name: str) -> tuple[str, str]:
    """What a member's name is before the first dot of its last part, and after it in small letters, as in webdataset.

    Both are empty if there is no dot, or nothing before it.
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.partition(".")
    return (f"{folder}{slash}{stem}", ending.lower()) if stem and dot else ("", "")


def _is_part(name: str) -> bool:
    """Whether a member is part of a sample: an image, a text or a JSON, and none of webdataset's own notes."""
    return key_and_ending(name)[1] in _ENDINGS and not _META.match(name)


def _check_size(header: Header, ending: str, path: Path) -> None:
    """Raise UserError if a member is too large to be read into memory."""
    if ending in IMAGES:
        check_encoded_size(header.size, f"{path}, {header.name}")
    elif header.size > LARGEST_TEXT:
        raise UserError(
            f"{path}, {header.name}: {header.size:,} bytes are more than the {LARGEST_TEXT:,} that a caption's file "
            "may have; take it out"
        )


def check_layout(path: Path, caption_key: str | None) -> None:
    """Say what in the headers of a shard looks as if it had been packed in another way.

    Raises UserError where most of its samples are no pairs because their files stand apart.
    """
    samples = incomplete = 0
    first, keys = "", set()
    for members in read_members(path):
        samples += 1
        keys.add(members[0].key)
        of = {member.ending: member for member in members}
        try:
            image_ending(of), caption_ending(of, caption_key)
        except Unusable as problem:
            incomplete += 1
            first = first or f"sample {members[0].key}: {problem}"
    dotted = [name for name in _other_names(path) if name.rpartition(".")[2].lower() in _ENDINGS]
    if dotted:
        log.warning(
            f"{path}: {len(dotted):,} files are left out, as their names have further dots ({dotted[0]}): to "
            "webdataset all behind the first dot is the ending; name them otherwise"
        )
    if incomplete:
        text = f"{path}: {incomplete:,} of {samples:,} samples are no pairs; {first}"
        if 2 * incomplete > samples > len(keys):
            raise UserError(f"{text}. The files of a sample must stand one after the other (tar --sort=name)")
        log.warning(text)


def _other_names(path: Path) -> Iterator[str]:
    """The names of files that are part of no sample, and not webdataset's own notes."""
    with _open(path) as file:
        for header in read_headers(path, file):
            hidden = header.name.rpartition("/")[2].startswith(".")  # macOS brings a ._file along with every file
            if not hidden and not _is_part(header.name) and not _META.match(header.name):
                yield header.name


def count_samples(path: Path) -> int:
    """Samples of a shard, from its headers."""
    return sum(1 for _ in read_members(path))


def read_samples(path: Path, first: int = 0) -> Iterator[dict[str, Any]]:
    """The samples of a shard from number `first` on: `__key__`, and the content of each member by its ending.

    Of two members of the same name the first is taken. The contents before `first` are not read. Raises UserError if
    the shard is cut short or broken, or a member is too large.
    """
    with _open(path) as file:
        for members in itertools.islice(_group(path, file), first, None):
            sample: dict[str, Any] = {"__key__": members[0].key}
            for member in members:
                if member.ending not in sample:
                    sample[member.ending] = _read_member(path, file, member)
            yield sample


def _read_member(path: Path, file: BinaryIO, member: Member) -> bytes:
    file.seek(member.begin)
    content = file.read(member.size)
    if len(content) != member.size:
        raise UserError(f"{path}: cannot be read as a tar (it has become shorter); fetch it again")
    return content


def image_ending(sample: Mapping[str, object]) -> str:
    """The ending of the sample's image. Raises Unusable where it has none."""
    ending = next((ending for ending in IMAGES if ending in sample), None)
    if ending is None:
        raise Unusable(f"it has no image ({', '.join(IMAGES)})")
    return ending


def caption_ending(sample: Mapping[str, object], caption_key: str | None) -> str:
    """The ending of the member that holds the captions. Raises Unusable where there is none."""
    wanted = ("json",) if caption_key else ("txt", "json")
    ending = next((ending for ending in wanted if ending in sample), None)
    if ending is None:
        raise Unusable(f"it has no {' and no '.join(f'.{ending}' for ending in wanted)}")
    return ending


def read_captions(content: bytes, ending: str, caption_key: str | None) -> list[str]:
    """The captions of a sample, each once: at least one. Raises Unusable where there is none.

    Args:
        content: of its .txt or .json.
        ending: which of them it is.
        caption_key: the key of a caption, or of a list of them, in a .json.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unusable(f"its .{ending} is not UTF-8 text") from None
    texts = [text] if ending == "txt" else _texts_of_json(text, caption_key or CAPTION)
    captions = [caption for caption in dict.fromkeys(map(clean_caption, texts)) if caption]
    if not captions:
        raise Unusable("its caption is empty")
    return captions


def captions_of(sample: Mapping[str, bytes], caption_key: str | None) -> list[str]:
    """The captions of a sample that was read, as `read_captions` has them."""
    ending = caption_ending(sample, caption_key)
    return read_captions(sample[ending], ending, caption_key)


def _texts_of_json(text: str, key: str) -> list[str]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"its .json is broken ({error})") from None
    if not isinstance(record, dict) or key not in record:
        keys = ", ".join(itertools.islice(record, KEYS_SHOWN)) if isinstance(record, dict) else type(record).__name__
        raise Unusable(f"its .json has no {key!r} (but {keys or 'nothing'}): --caption_key names another one")
    value = record[key]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Unusable(f"{key!r} in its .json is neither a text nor a list of texts")
    return texts
