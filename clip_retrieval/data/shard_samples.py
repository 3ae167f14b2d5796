"""What is in a tar shard: members whose names differ in the ending only are one sample, as webdataset has it.

    00017.jpg  00017.txt  00017.json

The headers alone say how many samples there are and where each begins; the samples themselves are read one after the
other by the webdataset library.
"""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from clip_retrieval.data.readers.files import clean_caption
from clip_retrieval.errors import UserError
from clip_retrieval.reporting.log import log

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTION = "caption"  # its key in a .json, unless another one is given
CHUNK = 1 << 20  # bytes
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

    Raises UserError where the shard is cut short or broken.
    """
    return (list(group) for _, group in itertools.groupby(_members(path), key=lambda member: member.key))


def _members(path: Path) -> Iterator[Member]:
    try:
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # (it would keep them all)
                if info.isreg() and _is_part(info.name):
                    key, ending = base_plus_ext(info.name)
                    yield Member(key, ending.lower(), info.offset, info.offset_data, info.size)
            # A header that makes no sense ends the iteration as well.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise UserError(f"{path}: broken at byte {tar.offset:,}; fetch it again")
            if any(chunk.strip(b"\0") for chunk in iter(lambda: tar.fileobj.read(CHUNK), b"")):
                raise UserError(f"{path}: goes on behind its end at byte {tar.offset:,}; is it several tars in one?")
    except (tarfile.TarError, OSError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UserError(f"{path}: cannot be read as a tar ({reason}); fetch it again")


def _is_part(name: str) -> bool:
    """Whether a member is part of a sample: an image, a text or a JSON, and none of webdataset's own notes."""
    key, ending = base_plus_ext(name)
    return key is not None and ending.lower() in _ENDINGS and not _META.match(name)


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
    with tarfile.open(path, "r:") as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()
            hidden = info.name.rpartition("/")[2].startswith(".")  # macOS brings a ._file along with every file
            if info.isreg() and not hidden and not _is_part(info.name) and not _META.match(info.name):
                yield info.name


def count_samples(path: Path) -> int:
    """Samples of a shard, from its headers."""
    return sum(1 for _ in read_members(path))


def read_samples(path: Path, first: int = 0) -> Iterator[dict[str, bytes]]:
    """The samples of a shard from number `first` on: `__key__`, and the content of each member by its ending.

    What stands before them is not read. Raises UserError where the shard is cut short or broken.
    """
    begin = 0
    if first:
        members = next(itertools.islice(read_members(path), first, None), None)
        if members is None:
            return
        begin = members[0].header
    try:
        with path.open("rb") as file:
            file.seek(begin)
            parts = tar_file_expander([{"url": str(path), "stream": file}], select_files=_is_part)
            yield from group_by_keys(parts, handler=_keep_the_first)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a tar ({error.args[0]}); fetch it again") from None


def _keep_the_first(error: Exception) -> bool:
    """Of two members of the same name, go on with the first; all else is an error."""
    if isinstance(error, ValueError):
        return True
    raise error


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
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise Unusable(f"its .json has no {key!r} (but {keys or 'nothing'}): --caption_key names another one")
    value = record[key]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Unusable(f"{key!r} in its .json is neither a text nor a list of texts")
    return texts
