"""Every reader refuses damaged files with one line.

A few mutations of each reader are tried here; `scripts/test.sh --full` tries thousands.
"""

import signal
import time
from pathlib import Path

import pytest

from tests.faults import fuzz as module
from tests.faults.fuzz import CRASHED, HUNG, fuzz
from tests.faults.program import call
from tests.faults.readers import READERS
from tests.faults.readers.reader import Reader
from tests.faults.worker import ACCEPTED, MEMORY_OUT, REFUSED, UNCAUGHT

COUNT, COUNT_OF_RUNS = 30, 8
"""Mutations of each reader, and of each reader that needs a whole run."""


def fuzz_by_name(name, count):
    return fuzz(READERS[name], count)


def test_there_are_more_than_thirty_readers():
    assert len(READERS) > 30


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused(name):
    count = COUNT_OF_RUNS if name.endswith(("resumed", "evaluated")) else COUNT
    report = call(fuzz_by_name, name, count)
    assert report.faults == 0, "\n".join(
        f"{kind}, mutation {outcome.number}: {root}\n{outcome.text}" for (kind, root), outcome in report.roots.items()
    )
    assert sum(report.counts.values()) == count


def make_document(folder: Path):
    (folder / "a.txt").write_text("valid")
    return [folder / "a.txt"]


def read_with_faults(path):
    """A reader with every kind of fault; the bytes of the document choose one."""
    import ctypes
    import os

    from clip_retrieval.errors import UserError

    text = path.read_bytes()
    if text == b"valid":
        return
    kind = sum(text) % 7
    if kind == 0:
        raise UserError(f"{path}: no")
    if kind == 1:
        raise KeyError("x")
    if kind == 2:
        ctypes.string_at(0)
    if kind == 3:
        time.sleep(60)
    if kind == 4:
        bytearray(2**40)
    if kind == 5:
        os._exit(7)


def fuzz_with_faults(count):
    module.DEADLINE, module.PATIENCE = 0.5, 1
    return fuzz(Reader("bad", make_document, read_with_faults), count)


def test_each_fault_is_counted_by_kind():
    report = call(fuzz_with_faults, 40)
    assert sum(report.counts.values()) == 40
    assert all(report.counts[kind] for kind in (ACCEPTED, REFUSED, UNCAUGHT, CRASHED, HUNG, MEMORY_OUT)), report.counts
    roots = {root for _, root in report.roots}
    assert signal.SIGSEGV.name in roots and "the process ended with code 7" in roots
    assert any(root.startswith("KeyError in ") for root in roots)
