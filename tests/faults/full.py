"""Run all campaigns and count: python -m tests.faults.full

python -m tests.faults.full --only kills --kills 20 --seed 3
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.faults import disks, kills, loaders, sharing, stops
from tests.faults.campaign import Campaign, Count, inputs, table

FILL, MOUNTED = "fill", "mounted"
ALL = ("kills", "disks", FILL, "stops", "sharing", "loaders", "hostile", "fuzz")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help=", ".join(ALL))
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--others", type=int, default=60, help="faults in each of the other campaigns")
    parser.add_argument("--mutations", type=int, default=5000, help="mutations of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files that caused a fault")
    args = parser.parse_args()
    wanted = args.only or ALL
    counts = _crashes(args, wanted)
    failed = any(count.lost or count.wrong for count in counts)
    if counts:
        print(table(counts), flush=True)
    if FILL in wanted:
        failed |= _run_in_private_mounts(args)
    for name, module in (("hostile", "tests.faults.hostile"), ("fuzz", "tests.faults.fuzz")):
        if name in wanted:
            failed |= _run_module(module, args)
    return int(failed)


def _crashes(args: argparse.Namespace, wanted: Sequence[str]) -> list[Count]:
    """Run the campaigns with disturbed runs."""
    run: dict[str, Callable[[Campaign], list[Count]]] = {
        "kills": lambda campaign: kills.kill_runs(campaign, args.kills),
        "disks": lambda campaign: [
            *disks.break_files(campaign, 3 * args.others),
            *disks.limit_files(campaign, args.others // 3),
            *disks.delete_folders(campaign, args.others // 3),
        ],
        "stops": lambda campaign: stops.stop_runs(campaign, args.others),
        "sharing": lambda campaign: sharing.share_folders(campaign, args.others // 3),
        "loaders": lambda campaign: loaders.kill_loaders(campaign, args.others),
        MOUNTED: lambda campaign: [
            *disks.fill_disks(campaign, args.others // 2),
            *disks.small_shared_memory(campaign),
        ],
    }

    # run the wanted ones, and print their notes
    counts: list[Count] = []
    with inputs(in_memory=MOUNTED not in wanted) as (folder, data):
        campaign = Campaign(folder, data, args.seed)
        for name in wanted:
            if name in run:
                found = run[name](campaign)
                for note in (note for count in found for note in count.notes):
                    print(note, flush=True)
                counts += found
    return counts


def _run_in_private_mounts(args: argparse.Namespace) -> bool:
    """Fill small file systems in a process with private mounts; return whether anything failed."""
    if not disks.can_mount():
        print("full disks: skipped, as this user may not mount file systems")
        return False
    command = [sys.executable, "-m", "tests.faults.full", "--only", MOUNTED]
    command += ["--others", str(args.others), "--seed", str(args.seed)]
    # A new process, because the server of the runs must start within the private mounts.
    return subprocess.run(["unshare", "-m", *command]).returncode != 0


def _run_module(module: str, args: argparse.Namespace) -> bool:
    command = [sys.executable, "-m", module]
    if module.endswith("fuzz"):
        command += ["--count", str(args.mutations), "--seed", str(args.seed)]
        command += ["--keep", str(args.keep)] if args.keep else []
    return subprocess.run(command).returncode != 0


if __name__ == "__main__":
    sys.exit(main())
