"""LMDB folders of Chinese-CLIP's form, built from `{split}_imgs.tsv` and `{split}_texts.jsonl`.

A split appears under its name when it is whole; before that it is in `.{split}.partial`, where an interrupted build
goes on. `sources.json` beside `imgs` and `pairs` tells whether they still are what the tsv and the jsonl hold.
"""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lmdb

from clip_retrieval.data.images.base64_images import pad_base64, read_tsv
from clip_retrieval.data.images.lmdb_folder import NUM_IMAGES, NUM_SAMPLES, TEXT_WITHOUT_IMAGE, LmdbImages
from clip_retrieval.data.readers.chinese import IMAGES, TEXTS, Text, Texts, read_texts
from clip_retrieval.errors import RunError, UserError
from clip_retrieval.files import open_regular, parse_json, to_json, write_text
from clip_retrieval.log import log, progress_bar

COMMIT_BYTES = 32 * 2**20  # what an interruption may lose
MAP_BYTES = 2**24  # of a new LMDB; doubled when it is full, from a gigabyte on a gigabyte at a time
PICKLE_PROTOCOL = 4  # the newest that every Python knows that Chinese-CLIP runs with
POSITION = b"\tposition"  # in an unfinished `imgs`: no id holds a tab
SOURCES, LOCK = "sources.json", "lock"


def build_lmdb(data_dir: Path, splits: Sequence[str], lmdb_dir: Path | None = None) -> None:
    """Build `lmdb_dir`/{split}/imgs and pairs for each split; by default in `data_dir`/lmdb.

    A split that is up to date is left alone, one that is not is replaced when the new one is whole, an unfinished one
    is gone on with.

    Raises:
        UserError: a file is missing, a line of one is not as it should be, or a folder cannot be used.
        RunError: the disk is full; what is there is kept.
    """
    for split in splits:
        for path in _sources(data_dir, split):
            if not path.is_file():
                raise UserError(f"{path}: no such file; check --data_dir and --splits")
    folder = lmdb_dir or data_dir / "lmdb"
    for split in splits:
        _build_split(*_sources(data_dir, split), folder / split)


def _sources(data_dir: Path, split: str) -> tuple[Path, Path]:
    return data_dir / f"{split}{IMAGES}", data_dir / f"{split}{TEXTS}"


def _build_split(tsv: Path, jsonl: Path, final: Path) -> None:
    stamps = {"images": _stamp(tsv), "texts": _stamp(jsonl)}
    if _read_sources(final) == stamps:
        log.info(f"{final} is up to date")
        return
    others = [path.name for path in final.iterdir()] if final.exists() else []
    if not set(others) <= {"imgs", "pairs", SOURCES}:
        raise UserError(f"{final} holds more than an LMDB ({', '.join(sorted(others))}); choose another --lmdb_dir")
    texts = read_texts(jsonl)  # first: what is wrong there need not wait until the images are written
    partial = final.with_name(f".{final.name}.partial")
    with _alone(partial):
        try:
            _fill(partial, tsv, texts, stamps)
            _replace(partial, final)
            log.info(f"wrote {final}")
        except (OSError, lmdb.Error) as error:
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise RunError(
                f"building {final} stopped: {reason}; what is there is kept, and the same command goes on when that is "
                "mended"
            ) from error


def _stamp(path: Path) -> list[int]:
    """Size and time of the last change: they differ where the content does."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _read_sources(folder: Path) -> dict[str, list[int]]:
    """What the folder was built from, as far as it is whole."""
    try:
        with open_regular(folder / SOURCES) as file:
            content = parse_json(file.read())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Make the folder, for this process to write to. Raises UserError where another one is at it."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # neither through a link nor at a FIFO
        with os.fdopen(os.open(partial / LOCK, flags, 0o666), "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError:
        raise UserError(f"{partial}: another process is building it; let it finish") from None
    except OSError as error:
        raise UserError(f"{partial}: cannot be written ({error.strerror}); choose another --lmdb_dir") from None


def _fill(partial: Path, tsv: Path, texts: Texts, stamps: dict[str, list[int]]) -> None:
    """Write what is not there yet."""
    there = _read_sources(partial)
    if there == stamps:
        return
    if there.get("images") != stamps["images"]:
        (partial / SOURCES).unlink(missing_ok=True)
        _write_images(tsv, stamps["images"], partial / "imgs")
        write_text(partial / SOURCES, json.dumps({"images": stamps["images"]}))
    keys = LmdbImages(partial / "imgs").keys
    pairs = _write_pairs(texts, texts.answers(keys, tsv), partial / "pairs")
    log.info(f"{tsv}: {len(keys):,} images, {len(texts.records):,} texts, {pairs:,} pairs")
    write_text(partial / SOURCES, json.dumps(stamps))
    _flush(partial)


def _replace(partial: Path, final: Path) -> None:
    """Give the folder its name; what has it so far goes away."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    (partial / LOCK).unlink()
    if final.exists():
        final.rename(old)
    partial.rename(final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    file = os.open(folder, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def _write_images(tsv: Path, stamp: list[int], folder: Path) -> None:
    """Copy the images, from the line on at which an interrupted build stopped."""
    start = {"source": stamp, "end": 0, "line": 0, "images": 0}
    store = _Store(folder)
    place = json.loads(store.get(POSITION) or "{}")
    if not isinstance(place, dict) or place.keys() != start.keys() or place["source"] != stamp:
        place = start
        store.clear()
    elif place["images"]:
        log.info(f"{folder}: {place['images']:,} images are there, going on after line {place['line']:,} of {tsv}")
    with store, progress_bar(total=stamp[0], initial=place["end"], desc=tsv.name, unit="B", unit_scale=True) as bar:
        for record in read_tsv(tsv, place["end"], place["line"]):
            key = record.key.encode()
            if key == NUM_IMAGES or len(key) > store.longest_key:
                raise UserError(
                    f"{tsv}, line {record.line}: no LMDB can hold the image id {record.key[:40]}; rename it"
                )
            if not store.put(key, pad_base64(record.base64)):
                raise UserError(f"{tsv}, line {record.line}: image {record.key} is there already; keep one of them")
            place |= {"end": record.end, "line": record.line, "images": place["images"] + 1}
            if store.pending_bytes >= COMMIT_BYTES:
                store.put(POSITION, json.dumps(place).encode())
                store.commit()
                bar.update(record.end - bar.n)
        if not place["images"]:
            raise UserError(f"{tsv}: holds no images")
        store.put(NUM_IMAGES, str(place["images"]).encode())
        store.commit(without=POSITION)
        bar.update(stamp[0] - bar.n)


def _write_pairs(texts: Texts, answers: Iterator[tuple[Text, int | str, int]], folder: Path) -> int:
    """A pair for each image of each text, and the texts that no image answers; it is quick, and begins anew.

    Returns the number of pairs. Raises UserError where a text names an image that is not there.
    """
    with _Store(folder) as store:
        store.clear()
        for number, (text, image_id, _) in enumerate(answers):
            pair = (image_id, text.text_id, text.text)
            store.put(str(number).encode(), pickle.dumps(pair, PICKLE_PROTOCOL))
            if store.pending_bytes >= COMMIT_BYTES:
                store.commit()
        unanswered = [text for text in texts.records if not text.image_ids]
        for row, text in enumerate(unanswered):
            line = to_json({"text_id": text.text_id, "text": text.text})
            store.put(TEXT_WITHOUT_IMAGE + f"{row:012d}".encode(), line)
        pairs = sum(len(text.image_ids) for text in texts.records)
        store.put(NUM_SAMPLES, str(pairs).encode())
        store.commit()
    return pairs


class _Store:
    """An LMDB folder being written; its map grows as needed. What was put counts when it is committed."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._pending: dict[bytes, bytes] = {}
        self.pending_bytes = 0
        # Without locks of its own: nobody reads it yet, and `_alone` keeps other writers away.
        self._env = lmdb.open(os.fsencode(folder), map_size=MAP_BYTES, lock=False)
        self.longest_key = self._env.max_key_size()

    def __enter__(self) -> _Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._env.close()

    def clear(self) -> None:
        """Begin anew."""
        self._env.close()
        shutil.rmtree(self._folder)
        self.__init__(self._folder)

    def get(self, key: bytes) -> bytes | None:
        """What is committed under a key."""
        with self._env.begin() as transaction:
            return transaction.get(key)

    def put(self, key: bytes, value: bytes) -> bool:
        """Put a value, unless the key has one: then False. The position may be put again."""
        if key in self._pending or (key != POSITION and self._has(key)):
            return False
        self._pending[key] = value
        self.pending_bytes += len(value)
        return True

    def _has(self, key: bytes) -> bool:
        with self._env.begin(buffers=True) as transaction:
            return transaction.get(key) is not None

    def commit(self, without: bytes | None = None) -> None:
        """Bring what was put to the disk, all or nothing, and take the key `without` away."""
        while True:
            try:
                with self._env.begin(write=True) as transaction:
                    for key, value in self._pending.items():
                        transaction.put(key, value)
                    if without:
                        transaction.delete(without)
                break
            except lmdb.MapFullError:
                size = self._env.info()["map_size"]
                self._env.set_mapsize(size + min(size, 2**30))
        self._pending.clear()
        self.pending_bytes = 0
