"""SIGTERM and SIGINT at random moments, once, twice or to the whole group; then the same command resumes."""

from __future__ import annotations

import signal
import time
from random import Random

from tests.faults.campaign import Campaign, Count
from tests.faults.program import Ended, Program
from tests.faults.runs import LOADERS

INTERRUPTED = 130


def stop_runs(campaign: Campaign, count: int, first: int = 0) -> list[Count]:
    """Send signals to `count` runs."""
    rows = [Count("one signal"), Count("two signals"), Count("a signal to the group")]
    for number in range(first, first + count):
        row, rng = rows[number % 3], campaign.rng("stop", number)
        kind = LOADERS if row is rows[2] else campaign.kind(number // 3)
        sent = rng.choice((signal.SIGTERM, signal.SIGINT))
        place, moment = campaign.place(), rng.uniform(0.05, 1.0) * campaign.undisturbed(kind).seconds
        program = place.start(kind)
        time.sleep(moment)
        row.tried += 1
        row.met += program.is_running
        ended = _stop(program, sent, row is rows[1], row is rows[2], rng)
        what = f"number {number}, {kind.name}, {sent.name} after {moment:.3f} s"
        _check(campaign, row, ended, sent, what, saved=(place.output / "last.pt").exists())
        campaign.check_end(row, place, kind, what)
    return rows


def _stop(program: Program, sent: signal.Signals, twice: bool, to_group: bool, rng: Random) -> Ended:
    program.send(sent, to_group=to_group)
    if twice:
        time.sleep(rng.uniform(0, 0.3))
        program.send(rng.choice((signal.SIGTERM, signal.SIGINT)))
    return program.wait(60)


def _check(campaign: Campaign, row: Count, ended: Ended, sent: signal.Signals, what: str, *, saved: bool) -> None:
    """Check for 130 and one line with the remedy, the signal itself before the run handles it, or 0 after the end."""
    if (ended.code == -sent or not (ended.out or ended.err)) and not saved:
        return
    words = ("--resume",) if ended.code == INTERRUPTED and saved else ()
    campaign.check_message(row, ended, (INTERRUPTED, 0), words, what)
