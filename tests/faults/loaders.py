"""Loader processes are killed while the run waits for them, computes, evaluates or writes a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from tests.faults import hooks
from tests.faults.campaign import Campaign, Count
from tests.faults.program import Ended
from tests.faults.runs import LOADERS, Place


def kill_loaders(campaign: Campaign, count: int, first: int = 0) -> list[Count]:
    """Kill the loaders of `count` runs, half of them while a file is written."""
    at_moments, at_writes = Count("a loader killed"), Count("a loader killed during a save")
    for number in range(first, first + count):
        rng, place = campaign.rng("loader", number), campaign.place()
        twin = campaign.undisturbed(LOADERS)
        row = (at_moments, at_writes)[number % 2]
        row.tried += 1
        if row is at_moments:
            moment = rng.uniform(0.1, 1.0) * twin.seconds
            what = f"number {number}, after {moment:.3f} s"
            ended, met = _at_moment(place, moment)
        else:
            groups = [key for key in sorted(twin.operations) if key[1].endswith((".pt", ".json", ".jsonl"))]
            kind, file = rng.choice(groups)
            fault = hooks.Fault(rng.randrange(twin.operations[kind, file]), hooks.KILL_CHILDREN, file=file, kind=kind)
            what = f"number {number}, at {kind} {fault.at} of {file}"
            ended = place.start(LOADERS, before=hooks.install, arguments=(place.folder, fault)).wait(90)
            met = ended.code != 0
        row.met += met
        campaign.check_message(row, ended, (0, 3), ("load",) if ended.code == 3 else (), what)
        if "disk" in "".join(ended.errors):
            row.note_wrong(f"{what}: {' '.join(ended.errors)[-300:]}")
        campaign.check_end(row, place, LOADERS, what)
    return [at_moments, at_writes]


def _at_moment(place: Place, moment: float) -> tuple[Ended, bool]:
    program = place.start(LOADERS)
    time.sleep(moment)
    found = hooks.children(program.pid) if program.is_running else []
    for child in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return program.wait(90), bool(found)
