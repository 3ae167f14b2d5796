"""Build or update an index: only new and changed photographs are encoded.

python scripts/search.py index PHOTOS --resume logs/ex0/best.pt

A file with the recorded size and time of change is not read. Another one of a size that the index knows is hashed: if
the index knows its content (a file that was renamed, copied, or only touched), it is not encoded either.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_retrieval.data.images.decode import read_encoded
from clip_retrieval.errors import Interrupted, UserError, format_counts
from clip_retrieval.log import log, progress_bar, start_log
from clip_retrieval.run.folder import lock_folder
from clip_retrieval.search.approximate import is_current, is_wanted, open_faiss
from clip_retrieval.search.files import Listing, Stamp, digest, list_photos
from clip_retrieval.search.index import (
    INDEX,
    Entry,
    Table,
    delete_unused,
    open_index,
    part_path,
    read_tables,
    write_table,
)
from clip_retrieval.search.source import choose_source
from clip_retrieval.signals import StopSignal

if TYPE_CHECKING:  # torch is not loaded to find that nothing has changed
    from clip_retrieval.search.encoder import Encoder

SAVE_SECONDS = 30.0
"""Seconds of work that a kill may cost."""
SETTLED = 3 * 10**9
"""A file that is younger (ns) when it is read may change again within the resolution of its file system's clock."""
MAX_LISTED = 20  # broken files in the log
BLOCK = 2**14  # features to copy at a time
_UNKNOWN = 0, -1, Entry("", -1, None, None)


@dataclass
class Plan:
    """The next state of an index.

    Attributes:
        kept: for each table, the rows of its features (-1: none) and the entries to keep.
        missing: stamps of the files to encode, by name.
        counts: number of files by what happened to them.
    """

    kept: list[list[tuple[int, Entry]]]
    missing: dict[str, Stamp] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


def update_index(
    photos: Path, folder: Path, typed: dict[str, Any], *, overwrite: bool = False, faiss: bool | None = None
) -> None:
    """Build or update the index in `folder`.

    typed: options of the command line; without a model, it is that of the index. overwrite: replace an index of
    another model. faiss: see `approximate.is_wanted`. Raises UserError without photographs, and for an index of
    another model; Interrupted on Ctrl-C.
    """
    start_log()
    listing = list_photos(photos)
    for place, problem in listing.unreadable.items():
        log.warning(f"{photos / place}: cannot be listed ({problem}); its photographs stay as they are in the index")
    with lock_folder(folder, "--index"):
        # choose the model; it is loaded only if there is something to encode, or if it may be another one
        tables = read_tables(folder)
        source = choose_source(typed, tables[0].model if tables else None)
        record, encoder = find_record(source, tables), None
        if record is None:
            encoder = load_encoder(source, typed)
            record = encoder.record
        own = select_tables(tables, record, overwrite=overwrite)
        plan = make_plan(photos, listing, own, retry=True)
        counts = plan.counts
        # encode the new and changed files
        if plan.missing:
            log.info(f"{photos}: {format_counts(image=len(plan.missing))} to encode")
            encoder = encoder or load_encoder(source, typed)
            if encoder.record["fingerprint"] != record["fingerprint"]:
                raise UserError(f"{record['name']}: its weights have changed; replace the index with --overwrite")
            encode_missing(photos, plan.missing, folder, encoder)
            own = select_tables(read_tables(folder), record, overwrite=overwrite)
            plan = make_plan(photos, listing, own, retry=False)
        # replace the index
        entries = [entry for part in plan.kept for _, entry in part]
        if [table.path.name for table in own] != [INDEX] or entries != own[0].entries:
            write_table(folder / INDEX, record, entries, record["dim"], copy_features(own, plan))
        index = open_index(folder, photos)
        delete_unused(folder, index.features_path)
        if is_wanted(len(index.entries), faiss) and not is_current(index.features_path, index.features):
            open_faiss(index.features_path, index.features)
    report(photos, folder, listing, entries, counts)


def load_encoder(source: dict[str, Any], typed: dict[str, Any]) -> Encoder:
    """Load torch and the model."""
    log.info("loading torch and the model")
    from clip_retrieval.search.encoder import Encoder

    return Encoder(source, typed)


def find_record(source: dict[str, Any], tables: Sequence[Table]) -> dict[str, Any] | None:
    """Return the record of the model if a table was made with the same options and the same, unchanged checkpoint."""
    for table in tables:
        if table.model["source"] == source:
            return table.model
    return None


def select_tables(tables: Sequence[Table], record: dict[str, Any], *, overwrite: bool) -> list[Table]:
    """Return the tables of this model. Raises UserError for an index of another one, unless it is overwritten."""
    own = [table for table in tables if table.model["fingerprint"] == record["fingerprint"]]
    others = [table for table in tables if table.path.name == INDEX and table not in own]
    if others and not overwrite:
        name = others[0].model["name"]
        raise UserError(
            f"{others[0].path.parent}: an index of another model ({name}) or of other weights; give that model, "
            "replace the index with --overwrite, or choose another folder with --index"
        )
    return own


def make_plan(photos: Path, listing: Listing, tables: Sequence[Table], *, retry: bool) -> Plan:
    """Match the files of a folder with the entries of tables; later tables take precedence.

    retry: forget the files that could not be opened, so that they are tried again.
    """
    # the entries by name and by content
    known: dict[str, tuple[int, int, Entry]] = {}
    contents: dict[tuple[int, str], tuple[int, int, Entry]] = {}
    for number, table in enumerate(tables):
        for row, entry in zip(table.rows.tolist(), table.entries):
            known[entry.name] = (number, row, entry)
            if entry.digest is not None:
                contents[entry.size, entry.digest] = (number, row, entry)
    sizes = {size for size, _ in contents}
    plan = Plan([[] for _ in tables])
    # files that are as recorded
    unknown: dict[str, Stamp] = {}
    for name, stamp in listing.stamps.items():
        number, row, entry = known.get(name, _UNKNOWN)
        # a file that could not be opened has no digest to recognise it by if it is young
        is_unopened = name in known and entry.digest is None
        if not retry if is_unopened else (entry.size, entry.mtime) == stamp:
            plan.kept[number].append((row, entry))
        else:
            unknown[name] = stamp
    # files whose content is known
    ambiguous = [name for name, stamp in unknown.items() if stamp[0] in sizes]
    for name in progress_bar(ambiguous, desc="comparing", leave=False):
        content = None
        with suppress(UserError):  # the encoding reports it
            content = contents.get((unknown[name][0], digest(read_encoded(str(photos / name)))))
        if content is not None:
            number, row, entry = content
            plan.kept[number].append((row, replace(entry, name=name, mtime=settled_time(unknown.pop(name)))))
            plan.counts["renamed or copied"] += name not in known
    # the others, and deleted files
    plan.missing = unknown
    plan.counts["new"] = sum(name not in known for name in unknown)
    plan.counts["changed"] = sum(name in known and known[name][2].digest is not None for name in unknown)
    for name, (number, row, entry) in known.items():
        if name not in listing.stamps:
            if listing.may_hold(name):
                plan.kept[number].append((row, entry))
            else:
                plan.counts["deleted"] += 1
    for part in plan.kept:
        part.sort(key=lambda kept: (kept[0], kept[1].name))
    return plan


def settled_time(stamp: Stamp) -> int | None:
    """The time of the last change of a file that was just read, or None if it may change again without a later one."""
    return stamp[1] if stamp[1] < time.time_ns() - SETTLED else None


def encode_missing(photos: Path, missing: dict[str, Stamp], folder: Path, encoder: Encoder) -> None:
    """Encode files, and save them in parts of the index. Raises Interrupted, after a save, on Ctrl-C or SIGTERM."""
    from clip_retrieval.search.photos import load_photos

    entries: list[Entry] = []
    features: list[np.ndarray] = []
    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        if entries:
            write_table(part_path(folder), encoder.record, entries, encoder.record["dim"], features)
        entries.clear()
        features.clear()
        saved = time.monotonic()

    bar = progress_bar(total=len(missing), desc="images", unit="image", leave=False)
    with StopSignal().handle_signals() as stop, bar:
        try:
            for batch in load_photos(photos, missing, encoder):
                if len(batch.pixels):
                    features.append(encoder.encode_pixels(batch.pixels).numpy())
                entries += [replace(entry, mtime=settled_time(missing[entry.name])) for entry in batch.entries]
                bar.update(len(batch.entries))
                if time.monotonic() - saved >= SAVE_SECONDS:
                    save()
                stop.check()
        except KeyboardInterrupt:
            save()
            raise Interrupted(f"interrupted after {bar.n:,} images, saved; repeat the command to continue") from None
    save()


def copy_features(tables: Sequence[Table], plan: Plan) -> Iterator[np.ndarray]:
    """Yield the features of the kept entries in blocks."""
    for table, part in zip(tables, plan.kept):
        features, rows = table.map_features(), np.array([row for row, _ in part if row >= 0], np.int64)
        for start in range(0, len(rows), BLOCK):
            yield features[rows[start : start + BLOCK]]


def report(photos: Path, folder: Path, listing: Listing, entries: Sequence[Entry], counts: Counter[str]) -> None:
    """Log what has changed, and the broken files."""
    broken = [entry for entry in entries if entry.problem is not None]
    for entry in broken[:MAX_LISTED]:
        log.warning(f"broken: {entry.problem}")
    if len(broken) > MAX_LISTED:
        log.warning(f'{len(broken) - MAX_LISTED:,} more are broken: the lines of {folder / INDEX} with a "problem"')
    kinds = ("new", "changed", "renamed or copied", "deleted")
    changes = ", ".join(f"{counts[kind]:,} {kind}" for kind in kinds if counts[kind])
    others = f"; {format_counts(**{'other file': listing.others})} ignored" if listing.others else ""
    log.info(
        f"{photos}: {format_counts(image=len(entries) - len(broken))} in the index ({changes or 'no changes'}), "
        f"{len(broken):,} broken{others}"
    )
