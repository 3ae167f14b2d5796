"""The parts that crash campaigns share: undisturbed runs to compare with, counts, and the table."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tests.faults import hooks
from tests.faults.program import Ended
from tests.faults.runs import KINDS, Kind, Place, differences, finish, write_inputs

LONGEST = 540  # characters of a message
IN_MEMORY = "/dev/shm"


@dataclass
class Count:
    """The row of a campaign.

    Attributes:
        name: name of the campaign.
        tried: injected faults.
        met: faults that hit the run; the others came after its end.
        lost: runs whose outputs differ from the undisturbed run's, or that do not resume.
        wrong: runs with an unexpected exit code or message.
        notes: a line on each lost run and wrong end.
    """

    name: str
    tried: int = 0
    met: int = 0
    lost: int = 0
    wrong: int = 0
    notes: list[str] = field(default_factory=list)

    def note_lost(self, what: str) -> None:
        self.lost += 1
        self.notes.append(f"{self.name}: lost: {what}")

    def note_wrong(self, what: str) -> None:
        self.wrong += 1
        self.notes.append(f"{self.name}: {what}")


class Undisturbed:
    """An undisturbed run of a kind: its folder, its seconds, and its file operations by group."""

    def __init__(self, folder: Path, data: Path, kind: Kind):
        self.kind = kind
        self.data = data
        self.place = Place(folder / f"undisturbed {kind.name}", data)
        ended = finish(self.place, kind)
        if ended.code != 0:
            raise RuntimeError(f"{kind.name}: {ended.err}")
        self.seconds = finish_again(self.place, kind)

    @cached_property
    def operations(self) -> dict[tuple[str, str], int]:
        """The number of operations of each kind on each file, in the run's folder and its cache."""
        place = Place(self.place.folder.with_name(f"recorded {self.kind.name}"), self.data)
        record = place.folder.with_name(f"record {self.kind.name}.txt")
        ended = place.start(self.kind, before=hooks.install, arguments=(place.folder, None, record)).wait()
        if ended.code != 0:
            raise RuntimeError(f"{self.kind.name}: {ended.err}")
        counts: dict[tuple[str, str], int] = {}
        for line in record.read_text().splitlines():
            kind, _, name = line.partition("\t")
            counts[kind, hooks.group(name)] = counts.get((kind, hooks.group(name)), 0) + 1
        shutil.rmtree(place.folder)
        return counts


def finish_again(place: Place, kind: Kind) -> float:
    """Repeat the run with a warm server, and return its seconds."""
    shutil.rmtree(place.folder)
    return finish(place, kind).seconds


@contextmanager
def inputs(*, in_memory: bool = True) -> Iterator[tuple[Path, Path]]:
    """A temporary folder, and the data in it."""
    place = IN_MEMORY if in_memory and Path(IN_MEMORY).is_dir() else None
    with tempfile.TemporaryDirectory(dir=place, prefix="campaign-") as folder:
        yield Path(folder), write_inputs(Path(folder))


class Campaign:
    """Creates places for runs, and undisturbed runs of each kind on demand."""

    def __init__(self, folder: Path, data: Path, seed: int = 0, kinds: Sequence[Kind] = KINDS):
        self.folder = folder
        self.data = data
        self.seed = seed
        self.kinds = kinds
        self._undisturbed: dict[str, Undisturbed] = {}
        self._number = 0

    def kind(self, number: int) -> Kind:
        """The kind of run `number`: one kind after the other."""
        return self.kinds[number % len(self.kinds)]

    def rng(self, name: str, number: int) -> random.Random:
        return random.Random(f"{name} {self.seed} {number}")

    def undisturbed(self, kind: Kind) -> Undisturbed:
        if kind.name not in self._undisturbed:
            self._undisturbed[kind.name] = Undisturbed(self.folder, self.data, kind)
        return self._undisturbed[kind.name]

    def place(self) -> Place:
        """Create a place for a new run."""
        self._number += 1
        return Place(self.folder / f"run {self._number}", self.data)

    def check_end(self, count: Count, place: Place, kind: Kind, what: str) -> None:
        """Resume a run to its end, compare it with the undisturbed one, and delete it."""
        ended = finish(place, kind)
        if ended.code != 0:
            count.note_lost(f"{what}: --resume auto ends with {ended.code}: {' '.join(ended.errors)[-300:]}")
        elif found := differences(place.output, self.undisturbed(kind).place.output):
            count.note_lost(f"{what}: {'; '.join(found)}")
        shutil.rmtree(place.folder, ignore_errors=True)

    @staticmethod
    def check_message(count: Count, ended: Ended, codes: tuple[int, ...], words: tuple[str, ...], what: str) -> None:
        """Check that a run ended with one of these exit codes, and one line that contains these words."""
        lines = [line for line in ended.errors if line.strip()]
        text = " | ".join(line.strip() for line in lines[-12:])[-900:]
        if ended.code not in codes:
            count.note_wrong(f"{what}: exit code {ended.code}: {text}")
        elif ended.code and ended.code > 0 and (len(lines) != 1 or len(lines[0]) > LONGEST):
            count.note_wrong(f"{what}: {len(lines)} lines: {text}")
        elif missing := [word for word in words if word not in text]:
            count.note_wrong(f"{what}: no {missing[0]!r} in: {text}")


def table(counts: list[Count]) -> str:
    """A table with a row for each campaign."""
    rows = [["campaign", "tried", "met", "lost", "wrong end"]]
    rows += [[c.name, str(c.tried), str(c.met), str(c.lost), str(c.wrong)] for c in counts]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths)))
        for row in rows
    )
