"""SIGKILL at random moments, and before and after file operations of a run; then the same command resumes."""

from __future__ import annotations

import signal
import time
from random import Random

from tests.faults import hooks
from tests.faults.campaign import Campaign, Count, Undisturbed
from tests.faults.runs import Place

SECOND_KILL = 0.4  # share of the runs that are killed again after they resume


def kill_runs(campaign: Campaign, count: int, first: int = 0) -> list[Count]:
    """Kill `count` runs, half of them at moments and half at file operations, and check that nothing is lost."""
    at_moments, at_operations = Count("SIGKILL at a moment"), Count("SIGKILL at a file operation")
    for number in range(first, first + count):
        kind, rng = campaign.kind(number), campaign.rng("kill", number)
        twin, place = campaign.undisturbed(kind), campaign.place()
        row = (at_moments, at_operations)[rng.randrange(2)]
        kills = []
        for _ in range(2 if rng.random() < SECOND_KILL else 1):
            row.tried += 1
            kill = _at_moment if row is at_moments else _at_operation
            met, what = kill(place, twin, rng)
            row.met += met
            kills.append(what)
        campaign.check_end(row, place, kind, f"number {number}, {kind.name}, killed {', then '.join(kills)}")
    return [at_moments, at_operations]


def _at_moment(place: Place, twin: Undisturbed, rng: Random) -> tuple[bool, str]:
    moment = rng.uniform(0, 1.1 * twin.seconds)
    program = place.start(twin.kind)
    time.sleep(moment)
    met = program.is_running
    program.send(signal.SIGKILL)
    program.wait(5)
    return met, f"after {moment:.3f} s"


def _at_operation(place: Place, twin: Undisturbed, rng: Random) -> tuple[bool, str]:
    (kind, file), number = rng.choice(sorted(twin.operations.items()))
    fault = hooks.Fault(
        rng.randrange(number), hooks.KILL, rng.choice((hooks.BEFORE, hooks.AFTER)), file=file, kind=kind
    )
    ended = place.start(twin.kind, before=hooks.install, arguments=(place.folder, fault)).wait(120)
    return ended.code == -signal.SIGKILL, f"{fault.when} {kind} {fault.at} of {number} of {file}"
