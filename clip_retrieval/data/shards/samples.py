"""Read the samples of a tar shard. As in webdataset, adjacent members whose names differ only in the ending are one.

    00017.jpg  00017.txt  00017.json

The number of samples and the position of each follow from the headers alone.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from clip_retrieval.data.captions import clean_caption
from clip_retrieval.data.images.decode import check_encoded_size
from clip_retrieval.data.shards.sources import Place, Source, is_forward, open_shard
from clip_retrieval.data.shards.tar_headers import Header, read_headers
from clip_retrieval.errors import UserError, format_counts, format_share
from clip_retrieval.log import log

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTION = "caption"  # default key in a .json
MAX_TEXT_BYTES = 2**24  # bytes of a .txt or .json
MAX_FORWARD_BYTES = 2**28  # of an image that a server or a compressed file may make up
LAYOUT_SAMPLES = 200  # samples, or files, of a shard that is read from front to back, to check its layout
KEYS_SHOWN = 5  # keys of a .json in a message
_ENDINGS = {*IMAGES, "txt", "json"}
_METADATA = re.compile(r"__[^/]*__($|/)")


class SkipSample(Exception):
    """The reason why a sample is skipped."""


class Member(NamedTuple):
    """A file in a shard: its key and ending, and the first byte and the size in bytes of its content."""

    key: str
    ending: str
    begin: int
    size: int


def read_members(path: Place) -> Iterator[list[Member]]:
    """Read the members of each sample from the headers alone.

    Raises UserError, naming the shard, if it is truncated or damaged, or a member is too large.
    """
    with open_shard(path) as file:
        for members in _group_members(path, file):
            yield list(members)


def _group_members(path: Place, file: Source) -> Iterator[Iterator[Member]]:
    """Yield the members of each sample while their headers are read, so that contents can be read in between."""
    for _, members in itertools.groupby(_iter_members(path, file), key=lambda member: member.key):
        yield members


def _iter_members(path: Place, file: Source) -> Iterator[Member]:
    for header in read_headers(path, file):
        if _is_sample_part(header.name):
            key, ending = key_and_ending(header.name)
            _check_size(header, ending, path, file)
            yield Member(key, ending, header.begin, header.size)


def key_and_ending(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part, as webdataset does; the ending in lower case.

    Both parts are empty if there is no dot, or nothing before it.
    """
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.partition(".")
    return (f"{folder}{slash}{stem}", ending.lower()) if stem and dot else ("", "")


def _is_sample_part(name: str) -> bool:
    """Whether a member is part of a sample: an image, a text or a JSON, but none of webdataset's metadata."""
    return key_and_ending(name)[1] in _ENDINGS and not _METADATA.match(name)


def _check_size(header: Header, ending: str, path: Place, file: Source) -> None:
    """Raise UserError if a member is too large to be read into memory."""
    if file.size is None and header.size > MAX_FORWARD_BYTES:
        raise UserError(f"{path}, {header.name}: {header.size:,} bytes, more than the {MAX_FORWARD_BYTES:,} allowed")
    if ending in IMAGES:
        check_encoded_size(header.size, f"{path}, {header.name}")
    elif header.size > MAX_TEXT_BYTES:
        raise UserError(
            f"{path}, {header.name}: {header.size:,} bytes, more than the {MAX_TEXT_BYTES:,} allowed in a caption's "
            "file; remove it"
        )


def check_layout(path: Place, caption_key: str | None) -> None:
    """Warn of incomplete samples and unusual names in the headers of a shard; of a remote or compressed one, the first.

    Raises UserError if most of its samples are incomplete because their files are not adjacent.
    """
    # count the samples without an image or a caption
    samples = incomplete = 0
    first, keys = "", set()
    most = LAYOUT_SAMPLES if is_forward(path) else None
    for members in itertools.islice(read_members(path), most):
        samples += 1
        keys.add(members[0].key)
        of = {member.ending: member for member in members}
        try:
            image_ending(of), caption_ending(of, caption_key)
        except SkipSample as problem:
            incomplete += 1
            first = first or f"sample {members[0].key}: {problem}"
    # names that webdataset splits at an unexpected dot
    dotted = [name for name in _read_other_names(path, most) if name.rpartition(".")[2].lower() in _ENDINGS]
    if dotted:
        log.warning(
            f"{path}: skipped {format_counts(file=len(dotted))} with several dots in the name ({dotted[0]}): "
            "webdataset takes everything after the first dot as the ending; rename them"
        )
    # more samples than keys: the files of a sample are not adjacent
    if incomplete:
        text = f"{path}: {format_share(incomplete, samples, 'sample')} incomplete; {first}"
        if 2 * incomplete > samples > len(keys):
            raise UserError(f"{text}; pack the files of each sample next to each other (tar --sort=name)")
        log.warning(text)


def _read_other_names(path: Place, most: int | None) -> Iterator[str]:
    """Read the names, of `most` files, that are neither part of a sample nor webdataset's metadata."""
    with open_shard(path) as file:
        for header in itertools.islice(read_headers(path, file), most):
            hidden = header.name.rpartition("/")[2].startswith(".")  # macOS adds a ._file for every file
            if not hidden and not _is_sample_part(header.name) and not _METADATA.match(header.name):
                yield header.name


def count_samples(path: Place) -> int:
    """Count the samples of a shard from its headers."""
    return sum(1 for _ in read_members(path))


def read_samples(path: Place, first: int = 0) -> Iterator[dict[str, Any]]:
    """Read the samples of a shard from number `first` on: `__key__`, and the content of each member by its ending.

    The first of two members with the same name is used. Contents before `first` are not read. Raises UserError if the
    shard is truncated or damaged, or a member is too large.
    """
    with open_shard(path) as file:
        for members in itertools.islice(_group_members(path, file), first, None):
            sample: dict[str, Any] = {}
            for member in members:
                sample["__key__"] = member.key
                if member.ending not in sample:
                    sample[member.ending] = _read_member(path, file, member)
            yield sample


def _read_member(path: Place, file: Source, member: Member) -> bytes:
    content = file.read_at(member.begin, member.size)
    if len(content) != member.size:
        raise UserError(f"{path}: cannot be read as a tar (it has become shorter); fetch it again")
    return content


def image_ending(sample: Mapping[str, object]) -> str:
    """Return the ending of the sample's image. Raises SkipSample if it has none."""
    ending = next((ending for ending in IMAGES if ending in sample), None)
    if ending is None:
        raise SkipSample(f"it has no image ({', '.join(IMAGES)})")
    return ending


def caption_ending(sample: Mapping[str, object], caption_key: str | None) -> str:
    """Return the ending of the member with the captions. Raises SkipSample if there is none."""
    allowed = ("json",) if caption_key else ("txt", "json")
    ending = next((ending for ending in allowed if ending in sample), None)
    if ending is None:
        raise SkipSample(f"it has no {' and no '.join(f'.{ending}' for ending in allowed)}")
    return ending


def read_captions(content: bytes, ending: str, caption_key: str | None) -> list[str]:
    """Read the captions of a sample, at least one, without duplicates. Raises SkipSample if there is none.

    Args:
        content: the content of its .txt or .json.
        ending: "txt" or "json".
        caption_key: the key of a caption, or of a list of captions, in a .json.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SkipSample(f"its .{ending} is not UTF-8 text") from None
    texts = [text] if ending == "txt" else _read_json_texts(text, caption_key or CAPTION)
    captions = [caption for caption in dict.fromkeys(map(clean_caption, texts)) if caption]
    if not captions:
        raise SkipSample("its caption is empty")
    return captions


def read_sample_captions(sample: Mapping[str, bytes], caption_key: str | None) -> list[str]:
    """Read the captions of a sample from `read_samples`, as `read_captions` does."""
    ending = caption_ending(sample, caption_key)
    return read_captions(sample[ending], ending, caption_key)


def _read_json_texts(text: str, key: str) -> list[str]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SkipSample(f"its .json is broken ({error})") from None
    if not isinstance(record, dict) or key not in record:
        keys = ", ".join(itertools.islice(record, KEYS_SHOWN)) if isinstance(record, dict) else type(record).__name__
        raise SkipSample(f"its .json has no {key!r} (found {keys or 'nothing'}); choose another key with --caption_key")
    value = record[key]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise SkipSample(f"{key!r} in its .json is neither a text nor a list of texts")
    return texts
