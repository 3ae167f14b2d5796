"""Full, broken, read-only or deleted disks: the run ends with code 3 and one line, and resumes afterwards."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.faults import hooks
from tests.faults.campaign import Campaign, Count
from tests.faults.program import Ended
from tests.faults.runs import LOADERS, Kind, Place, differences

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ESTALE)
OPERATIONS = ("open", "write", "flush", "fsync", "rename", "mkdir")


def break_files(campaign: Campaign, count: int, first: int = 0) -> list[Count]:
    """Make `count` file operations fail, each kind on each file in turn, once or permanently."""
    row = Count("an operation fails")
    for number in range(first, first + count):
        kind, rng = campaign.kind(number), campaign.rng("disk", number)
        twin, place = campaign.undisturbed(kind), campaign.place()
        groups = [key for key in sorted(twin.operations) if key[0] in OPERATIONS]
        operation, file = groups[number // len(campaign.kinds) % len(groups)]
        error = rng.choice(ERRORS)
        at = rng.randrange(twin.operations[operation, file])
        fault = hooks.Fault(at, error, file=file, kind=operation, lasting=rng.random() < 0.5)
        row.tried += 1
        ended = place.start(kind, before=hooks.install, arguments=(place.folder, fault)).wait(120)
        row.met += ended.code != 0
        what = f"number {number}, {kind.name}, {errno.errorcode[error]} at {operation} {at} of {file}"
        # At the start, an unwritable folder is a wrong option (code 2). A run does not need all of its files.
        codes = (2, 3) if not (place.output / "log.txt").exists() else (3,)
        campaign.check_message(row, ended, codes if ended.code else (0, 3), _words(file, ended.code), what)
        campaign.check_end(row, place, kind, what)
    return [row]


def _words(file: str, code: int | None) -> tuple[str, ...]:
    """Words that the message must contain."""
    return (file,) if code == 3 and file.endswith((".pt", ".json", ".jsonl", ".txt")) else ()


def limit_files(campaign: Campaign, count: int, first: int = 0) -> list[Count]:
    """Limit the size of files (EFBIG), as a quota does."""
    row = Count("a limit on files")
    for number in range(first, first + count):
        kind, rng = campaign.kind(number), campaign.rng("limit", number)
        place = campaign.place()
        largest = max(path.stat().st_size for path in campaign.undisturbed(kind).place.output.iterdir())
        size = rng.randrange(1, largest)
        row.tried += 1
        ended = place.start(kind, before=hooks.limit_files, arguments=(size,)).wait(120)
        row.met += ended.code != 0
        what = f"number {number}, {kind.name}, files of {size:,} bytes"
        campaign.check_message(row, ended, (2, 3), (), what)
        campaign.check_end(row, place, kind, what)
    return [row]


def delete_folders(campaign: Campaign, count: int, first: int = 0) -> list[Count]:
    """Delete the output folder while the run writes to it."""
    row = Count("the folder is deleted")
    for number in range(first, first + count):
        kind, rng = campaign.kind(number), campaign.rng("delete", number)
        place = campaign.place()
        program = place.start(kind)
        end = time.perf_counter() + 20
        while not (place.output / "metrics.jsonl").exists() and time.perf_counter() < end:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.5) * campaign.undisturbed(kind).seconds)
        row.tried += 1
        row.met += program.is_running
        shutil.rmtree(place.output, ignore_errors=True)
        ended = program.wait(120)
        what = f"number {number}, {kind.name}, the folder deleted"
        words = (str(place.output), "deleted") if ended.code == 3 else ()
        campaign.check_message(row, ended, (0, 3), words, what)
        shutil.rmtree(place.folder, ignore_errors=True)
        campaign.check_end(row, place, kind, what)
    return [row]


def can_mount() -> bool:
    """Whether this process may mount a private file system."""
    if os.geteuid() or shutil.which("unshare") is None:
        return False
    command = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


def fill_disks(campaign: Campaign, count: int, first: int = 0) -> list[Count]:
    """Use real file systems that are too small or become read-only; this process must run under `unshare -m`."""
    full, read_only = Count("a full disk"), Count("a read-only disk")
    for number in range(first, first + count):
        kind, rng = campaign.kind(number), campaign.rng("full", number)
        twin, place = campaign.undisturbed(kind), campaign.place()
        logs = place.folder / "logs"
        logs.mkdir(parents=True)
        whole = sum(path.stat().st_size for path in twin.place.output.rglob("*") if path.is_file())
        size = rng.randrange(4096, whole)
        _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", logs)
        try:
            _fill(campaign, full, kind, place, f"number {number}, {kind.name}, {size:,} bytes")
        finally:
            subprocess.run(["umount", "-l", logs], check=True)
        shutil.rmtree(place.folder)
        if number % 3 == 0:
            _make_read_only(campaign, read_only, kind, number)
    return [full, read_only]


def _fill(campaign: Campaign, row: Count, kind: Kind, place: Place, what: str) -> None:
    row.tried += 1
    ended = place.start(kind).wait(120)
    row.met += ended.code != 0
    campaign.check_message(row, ended, (2, 3), (str(place.folder / "logs"),), what)
    _mount("-o", "remount,size=200m", place.folder / "logs")
    ended = place.start(kind).wait(120)
    _compare(campaign, row, kind, place, ended, what)


def _make_read_only(campaign: Campaign, row: Count, kind: Kind, number: int) -> None:
    """Kill a run, make its disk read-only, then writable again."""
    place, rng = campaign.place(), campaign.rng("read-only", number)
    logs, what = place.folder / "logs", f"number {number}, {kind.name}, read-only"
    logs.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", "size=200m", "tmpfs", logs)
    try:
        program = place.start(kind)
        time.sleep(rng.uniform(0, 1) * campaign.undisturbed(kind).seconds)
        program.send(signal.SIGKILL)
        program.wait(5)
        _mount("-o", "remount,ro", logs)
        row.tried += 1
        ended = place.start(kind).wait(120)
        row.met += ended.code != 0
        campaign.check_message(row, ended, (2, 3), (str(logs),), what)
        _mount("-o", "remount,rw", logs)
        ended = place.start(kind).wait(120)
        _compare(campaign, row, kind, place, ended, what)
    finally:
        subprocess.run(["umount", "-l", logs], check=True)
        shutil.rmtree(place.folder, ignore_errors=True)


def _compare(campaign: Campaign, row: Count, kind: Kind, place: Place, ended: Ended, what: str) -> None:
    if ended.code != 0:
        row.note_lost(f"{what}: --resume auto ends with {ended.code}: {' '.join(ended.errors)[-300:]}")
    elif found := differences(place.output, campaign.undisturbed(kind).place.output):
        row.note_lost(f"{what}: {'; '.join(found)}")


def _mount(*words: object) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True)


def small_shared_memory(campaign: Campaign, sizes: tuple[str, ...] = ("4k", "16k", "64m")) -> list[Count]:
    """Mount a small /dev/shm: Docker's 64 MB suffice, smaller ones end with a line that names it."""
    row = Count("a small /dev/shm")
    for size in sizes:
        place = campaign.place()
        row.tried += 1
        _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", Path("/dev/shm"))
        try:
            ended = place.start(LOADERS).wait(60)
        finally:
            subprocess.run(["umount", "-l", "/dev/shm"], check=True)
        row.met += ended.code != 0
        codes, words = ((0,), ()) if size == "64m" else ((0, 3), ("/dev/shm",) if ended.code else ())
        campaign.check_message(row, ended, codes, words, f"/dev/shm of {size}")
        shutil.rmtree(place.folder, ignore_errors=True)
    return [row]
