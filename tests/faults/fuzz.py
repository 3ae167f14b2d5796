"""Feed mutations of valid files to every reader of the package.

python -m tests.faults.fuzz --count 5000                        # a row for each reader
python -m tests.faults.fuzz --count 300 --reader png --keep failed/     # readers with "png" in their names

A document is accepted, or refused with one line and exit code 2 or 3. Everything else is a fault: an uncaught
error, a signal, more than ten seconds, more than 4 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Set before torch is imported: a forked process does not inherit the threads of its parent.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

from tests.faults.readers import READERS
from tests.faults.readers.reader import Reader
from tests.faults.worker import ACCEPTED, MEMORY_OUT, REFUSED, UNCAUGHT, Documents, Outcome, start

DEADLINE = 10.0  # CPU seconds per document
PATIENCE = 6  # times as many seconds of wall time
SETUP = 60.0  # CPU seconds until the first document
CRASHED, HUNG = "crashed", "hung"
KINDS = (ACCEPTED, REFUSED, UNCAUGHT, CRASHED, HUNG, MEMORY_OUT)
FAULTS = KINDS[2:]
IN_MEMORY = "/dev/shm"


@dataclass
class Report:
    """The outcomes of the mutations of a reader.

    Attributes:
        reader: name of the reader.
        counts: number of outcomes by kind.
        roots: the first outcome of each distinct fault.
        times: number of occurrences of each distinct fault.
        seconds: wall time.
    """

    reader: str
    counts: Counter = field(default_factory=Counter)
    roots: dict[tuple[str, str], Outcome] = field(default_factory=dict)
    times: Counter = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def faults(self) -> int:
        return sum(self.counts[kind] for kind in FAULTS)

    def add(self, outcome: Outcome) -> None:
        self.counts[outcome.kind] += 1
        if outcome.kind in FAULTS:
            key = (outcome.kind, outcome.root)
            self.roots.setdefault(key, outcome)
            self.times[key] += 1


def fuzz(reader: Reader, count: int, seed: int = 0, first: int = 0) -> Report:
    """Read the mutations `first` to `first` + `count` - 1 of a reader's documents."""
    report = Report(reader.name)
    began = time.perf_counter()
    place = IN_MEMORY if Path(IN_MEMORY).is_dir() else None
    with tempfile.TemporaryDirectory(dir=place, prefix="faults-") as folder:
        for outcome in _outcomes(reader, Path(folder) / "documents", seed, first, first + count):
            report.add(outcome)
    report.seconds = time.perf_counter() - began
    return report


def _outcomes(reader: Reader, folder: Path, seed: int, first: int, end: int) -> Iterator[Outcome]:
    """Yield the outcome of each mutation; a lost process is replaced by a new one."""
    while first < end:
        # read the reports of a process until it ends or hangs
        child, pipe = start(reader, folder, seed, first, end)
        lost = UNCAUGHT
        number = None
        for line in _lines(pipe, child):
            if line is None:
                lost = HUNG
                break
            if not line.startswith("{"):
                number = int(line)
                continue
            yield Outcome(**json.loads(line))
            number = None
            first += 1

        # report the mutation that it did not survive
        os.close(pipe)
        if lost == HUNG:
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if number is None:
            if first < end:
                raise RuntimeError(f"{reader.name}: the process ended with status {status} between two documents")
            return
        if lost == HUNG:
            yield Outcome(number, HUNG, f"more than {DEADLINE:g} s")
        elif os.WIFSIGNALED(status):
            yield Outcome(number, CRASHED, signal.Signals(os.WTERMSIG(status)).name)
        else:
            yield Outcome(number, UNCAUGHT, f"the process ended with code {os.WEXITSTATUS(status)}")
        first = number + 1


def _lines(pipe: int, child: int) -> Iterator[str | None]:
    """Yield the lines that a process writes to a pipe, until it is closed; None if the next line takes too long.

    The limit is DEADLINE of CPU time, or PATIENCE times as much wall time, because a busy machine is not a fault.
    """
    rest, deadline = b"", SETUP  # the documents are written first
    while True:
        began, cpu_began = time.monotonic(), _cpu_seconds(child)
        while not select.select([pipe], [], [], min(1.0, deadline / 4))[0]:
            if _cpu_seconds(child) - cpu_began > deadline or time.monotonic() - began > PATIENCE * deadline:
                yield None
                return
        read = os.read(pipe, 1 << 16)
        if not read:
            return
        *whole, rest = (rest + read).split(b"\n")
        for line in whole:
            yield line.decode()
        deadline = DEADLINE


def _cpu_seconds(process: int) -> float:
    """CPU seconds of a process."""
    times = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def table(reports: Iterable[Report]) -> str:
    """A table with the counts of each reader, and their sums."""
    rows = [[r.reader, *(str(r.counts[kind]) for kind in KINDS), f"{r.seconds:.0f}"] for r in reports]
    sums = [str(sum(int(row[i]) for row in rows)) for i in range(1, len(KINDS) + 2)]
    lines = [["reader", *KINDS, "seconds"], *rows, ["all", *sums]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width) for i, (text, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def keep(reader: Reader, report: Report, folder: Path, seed: int) -> None:
    """Write the first document of each distinct fault to `folder`, with its traceback."""
    with tempfile.TemporaryDirectory() as temporary:
        documents = Documents(reader, Path(temporary), seed)
        for (kind, root), outcome in report.roots.items():
            chosen, content = documents.mutation(outcome.number)
            name = f"{reader.name.replace(' ', '-').replace(',', '')}-{kind}-{outcome.number}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}{documents.paths[chosen].suffix}").write_bytes(content)
            text = f"{root}\n{report.times[kind, root]} times\n\n{outcome.text}\n"
            (folder / f"{name}.txt").write_text(text, errors="backslashreplace")


def _fuzz_and_keep(job: tuple[str, argparse.Namespace]) -> Report:
    name, args = job
    report = fuzz(READERS[name], args.count, args.seed, args.first)
    if args.keep:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            keep(READERS[name], report, args.keep, args.seed)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=5000, help="mutations of each reader")
    parser.add_argument("--reader", default="", help="only readers with this text in their names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--keep", type=Path, help="folder for a document of each distinct fault")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="number of parallel readers")
    args = parser.parse_args()
    jobs = [(name, args) for name in READERS if args.reader in name]
    reports = []
    with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
        for report in pool.imap(_fuzz_and_keep, jobs, chunksize=1):
            reports.append(report)
            for (kind, root), outcome in report.roots.items():
                times = report.times[kind, root]
                print(f"{report.reader}, mutation {outcome.number}: {kind}: {root} ({times} times)", flush=True)
    print(table(reports))
    return int(any(report.faults for report in reports))


if __name__ == "__main__":
    sys.exit(main())
