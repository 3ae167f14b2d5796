"""LMDB folders in Chinese-CLIP's format, built from `{split}_imgs.tsv` and `{split}_texts.jsonl`.

A split is built in `.{split}.partial` and moved to its place when it is complete: an interrupted build leaves nothing
under the split's own name. `sources.json` records size and time of the two files, to skip a split that is up to date.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import lmdb

from clip_retrieval.data.images.base64_images import pad_base64, read_tsv
from clip_retrieval.data.images.lmdb_folder import NUM_IMAGES, NUM_SAMPLES, TEXT_WITHOUT_IMAGE, LmdbImages
from clip_retrieval.data.readers.chinese import IMAGES, TEXTS, Texts, read_texts
from clip_retrieval.errors import RunError, UserError, describe, format_counts
from clip_retrieval.files import open_append, read_json, remove_special, to_json, write_json
from clip_retrieval.log import log, progress_bar

COMMIT_BYTES = 32 * 2**20  # values per transaction
MAP_BYTES = 2**24  # initial map of an LMDB
LONGEST_KEY = 511  # bytes, liblmdb's default
PICKLE_PROTOCOL = 4  # the newest that every Python of Chinese-CLIP reads
SOURCES = "sources.json"


def build_lmdb(data_dir: Path, splits: Sequence[str], lmdb_dir: Path | None = None) -> None:
    """Build `lmdb_dir`/{split}/imgs and pairs for each split; by default in `data_dir`/lmdb.

    A split that is up to date is skipped; any other one is rebuilt, and replaced when the new one is complete.

    Raises:
        UserError: a file is missing or has an invalid line, or a folder cannot be written.
        RunError: the disk is full or fails.
    """
    sources = [(data_dir / f"{split}{IMAGES}", data_dir / f"{split}{TEXTS}") for split in splits]
    for path in (path for pair in sources for path in pair):
        if not path.is_file():
            raise UserError(f"{path}: no such file; check --data_dir and --splits")
    for split, (tsv, jsonl) in zip(splits, sources):
        _build_split(tsv, jsonl, (lmdb_dir or data_dir / "lmdb") / split)


def _build_split(tsv: Path, jsonl: Path, final: Path) -> None:
    # skip a split that is up to date, refuse a folder of something else
    stats = {"images": tsv.stat(), "texts": jsonl.stat()}
    stamps = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    with suppress(UserError):  # no such file
        if read_json(final / SOURCES) == stamps:
            log.info(f"{final} is up to date")
            return
    others = {path.name for path in final.iterdir()} if final.exists() else set()
    if others := others - {"imgs", "pairs", SOURCES}:
        raise UserError(f"{final}: holds more than an LMDB ({', '.join(sorted(others))}); choose another --lmdb_dir")

    texts = read_texts(jsonl)  # first: an invalid line should be reported before gigabytes are copied
    with _lock_partial_folder(final) as new:
        try:
            # write the new split
            _write_lmdb(new / "imgs", _iter_image_items(tsv))
            keys = LmdbImages(new / "imgs").keys
            _write_lmdb(new / "pairs", _iter_pair_items(texts, keys, tsv))
            write_json(new / SOURCES, stamps)

            # replace the old one
            if final.exists():
                final.rename(new.with_name("old"))
            new.rename(final)
        except (OSError, lmdb.Error) as error:
            raise RunError(f"{final}: cannot be built ({describe(error)}); fix that and repeat the command") from error
    pairs = sum(len(text.image_ids) for text in texts.records)
    log.info(f"{tsv}: {format_counts(image=len(keys), text=len(texts.records), pair=pairs)}")
    log.info(f"wrote {final}")


@contextmanager
def _lock_partial_folder(final: Path) -> Iterator[Path]:
    """Make an empty folder `new` in `.{name}.partial` beside `final`, locked for this process; delete it afterwards.

    Raises UserError if another process holds the lock, or the folder cannot be written.
    """
    partial, lock = (final.with_name(f".{final.name}.{ending}") for ending in ("partial", "lock"))
    with ExitStack() as stack:
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open_append(lock)), fcntl.LOCK_EX | fcntl.LOCK_NB)
            stack.callback(lock.unlink, missing_ok=True)
            remove_special(partial, keep_folder=True)  # a link would lead elsewhere
            shutil.rmtree(partial, ignore_errors=True)  # left by a build that was killed
            (partial / "new").mkdir(parents=True)
        except BlockingIOError:
            raise UserError(f"{partial}: another process is building it; let it finish") from None
        except OSError as error:
            raise UserError(f"{partial}: cannot be written ({describe(error)}); choose another --lmdb_dir") from None
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        yield partial / "new"


def _iter_image_items(tsv: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield key and value of each image, and then their number: without it an LMDB is incomplete."""
    number = 0
    with progress_bar(total=tsv.stat().st_size, desc=tsv.name, unit="B", unit_scale=True) as bar:
        for record in read_tsv(tsv):
            key = record.key.encode()
            if key == NUM_IMAGES or len(key) > LONGEST_KEY:
                raise UserError(
                    f"{tsv}, line {record.line}: an LMDB cannot hold the image id {record.key[:40]}; rename it"
                )
            yield key, pad_base64(record.base64)
            number += 1
            bar.update(record.begin + len(record.base64) - bar.n)
    yield NUM_IMAGES, str(number).encode()


def _iter_pair_items(texts: Texts, keys: Sequence[str], tsv: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield a pair for each image of each text, the texts without an image, and the number of pairs.

    Raises UserError if a text names an image that `keys`, the image ids of `tsv`, lacks.
    """
    number = 0
    for text, image_id, _ in texts.iter_pairs(keys, tsv):
        yield str(number).encode(), pickle.dumps((image_id, text.text_id, text.text), PICKLE_PROTOCOL)
        number += 1
    for row, text in enumerate(text for text in texts.records if not text.image_ids):
        line = to_json({"text_id": text.text_id, "text": text.text})
        yield TEXT_WITHOUT_IMAGE + f"{row:012d}".encode(), line
    yield NUM_SAMPLES, str(number).encode()


def _write_lmdb(folder: Path, items: Iterable[tuple[bytes, bytes]]) -> None:
    """Write an LMDB folder, in several transactions: a single one would hold all values in memory."""
    # Without LMDB's own locks: `_lock_partial_folder` excludes other writers.
    with lmdb.open(os.fsencode(folder), map_size=MAP_BYTES, lock=False) as env:
        batch, size = [], 0
        for item in items:
            batch.append(item)
            size += len(item[1])
            if size >= COMMIT_BYTES:
                _commit(env, batch)
                batch, size = [], 0
        _commit(env, batch)


def _commit(env: lmdb.Environment, batch: Sequence[tuple[bytes, bytes]]) -> None:
    """Write items to disk, all or none. A full map doubles, or grows by a gigabyte."""
    while True:
        try:
            with env.begin(write=True) as transaction:
                transaction.cursor().putmulti(batch)
            return
        except lmdb.MapFullError:
            size = env.info()["map_size"]
            env.set_mapsize(size + min(size, 2**30))
