"""Several runs in one folder: at the same time, and after a killed run."""

from __future__ import annotations

import shutil
import signal
import time

from tests.faults.campaign import Campaign, Count
from tests.faults.runs import Kind, Place, differences

SECONDS = 20.0  # longest start of a run


def share_folders(campaign: Campaign, count: int, first: int = 0) -> list[Count]:
    """Start a second run beside a first, several runs at once, and a run in the folder of a killed one."""
    second, at_once, killed = Count("a second run"), Count("runs at once"), Count("after a killed run")
    for number in range(first, first + count):
        kind = campaign.kind(number)
        _second(campaign, second, kind, number)
        _at_once(campaign, at_once, kind, number)
        _after_kill(campaign, killed, kind, number)
    return [second, at_once, killed]


def _wait_for(place: Place, name: str) -> bool:
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        if (place.output / name).exists():
            return True
        time.sleep(0.002)
    return False


def _second(campaign: Campaign, row: Count, kind: Kind, number: int) -> None:
    """Check that a second run is refused with any options, and that the first one is unaffected."""
    place, rng = campaign.place(), campaign.rng("second", number)
    first = place.start(kind)
    _wait_for(place, rng.choice(("log.txt", "metrics.jsonl", "last.pt")))
    first.send(signal.SIGSTOP)  # it must not end while the second starts
    how, resume = rng.choice((((), True), (("--overwrite",), False), ((), False)))
    row.tried += 1
    ended = place.start(kind, *how, resume=resume).wait(60)
    row.met += first.is_running
    first.send(signal.SIGCONT)
    what = f"number {number}, {kind.name}, a second run with {' '.join(how) or '--resume auto' if resume else how}"
    campaign.check_message(row, ended, (2,), (str(place.output),), what)
    first_ended = first.wait(120)
    if first_ended.code != 0:
        row.note_lost(f"{what}: the first ended with {first_ended.code}: {' '.join(first_ended.errors)[-300:]}")
    elif found := differences(place.output, campaign.undisturbed(kind).place.output):
        row.note_lost(f"{what}: {'; '.join(found)}")
    shutil.rmtree(place.folder, ignore_errors=True)


def _at_once(campaign: Campaign, row: Count, kind: Kind, number: int) -> None:
    """Check that of three simultaneous runs only one at a time works in the folder."""
    place = campaign.place()
    row.tried += 1
    programs = [place.start(kind) for _ in range(3)]
    ends = [program.wait(120) for program in programs]
    what = f"number {number}, {kind.name}, three runs at once"
    row.met += any(ended.code == 2 for ended in ends)
    for ended in ends:
        campaign.check_message(row, ended, (0, 2), (str(place.output),) if ended.code == 2 else (), what)
    if not any(ended.code == 0 for ended in ends):
        row.note_lost(f"{what}: no run finished")
    campaign.check_end(row, place, kind, what)


def _after_kill(campaign: Campaign, row: Count, kind: Kind, number: int) -> None:
    """Check that the lock of a killed run does not block another run, even if its loaders still live."""
    place, rng = campaign.place(), campaign.rng("after kill", number)
    row.tried += 1
    program = place.start(kind)
    _wait_for(place, rng.choice(("log.txt", "last.pt")))
    row.met += program.is_running
    program.send(signal.SIGKILL)
    campaign.check_end(row, place, kind, f"number {number}, {kind.name}, after a kill")
    program.wait(5)
