"""Reads mutated documents in a separate process, which may be killed, hang, or run out of memory.

The process is forked from one that has imported everything, so a new one after a crash starts at once. It reports each
document before and after reading it.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import random
import resource
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.faults.mutate import mutate
from tests.faults.readers.reader import Reader

MEMORY = 4 * 2**30  # limit of a reader in bytes, beyond the initial address space
LONGEST_MESSAGE = 500  # characters, without "error: "
IN_CONTAINER = 0.6  # share of the mutations within a container
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "std::bad_alloc")

ACCEPTED, REFUSED, UNCAUGHT, MEMORY_OUT = "accepted", "refused", "uncaught", "memory"


@dataclass
class Outcome:
    """The outcome of reading a document.

    Attributes:
        number: number of the mutation.
        kind: ACCEPTED, REFUSED, UNCAUGHT or MEMORY_OUT; the parent adds the kinds that end the process.
        root: the cause: the type of the error, and the functions of the package and of a library that raised it.
        text: the traceback, or the message.
    """

    number: int
    kind: str
    root: str = ""
    text: str = ""


class Documents:
    """The documents of a reader, and their mutations by number."""

    def __init__(self, reader: Reader, folder: Path, seed: int):
        self.reader = reader
        self.seed = seed
        self.paths = list(reader.make(folder))
        self.contents = [path.read_bytes() for path in self.paths]

    def mutation(self, number: int) -> tuple[int, bytes]:
        """The index of the changed document, and its changed bytes."""
        rng = random.Random(f"{self.reader.name} {self.seed} {number}")
        chosen = rng.randrange(len(self.paths))
        document, suffix = self.contents[chosen], self.paths[chosen].suffix
        settings = {"tokens": self.reader.tokens}
        settings["others"] = [c for path, c in zip(self.paths, self.contents) if path.suffix == suffix]
        if not self.reader.containers or rng.random() > IN_CONTAINER:
            return chosen, mutate(document, rng, **settings)
        try:
            container = rng.choice(self.reader.containers)
            return chosen, container(document, rng, lambda part: mutate(part, rng, **settings))
        except Exception:  # for example a part that is too large for its container
            return chosen, mutate(document, rng, **settings)

    def read(self, number: int) -> Outcome:
        """Read a mutation as a run would, then restore the document."""
        chosen, content = self.mutation(number)
        _replace(self.paths[chosen], content)
        try:
            outcome = judge(lambda: self.reader.read(self.paths[chosen]))
        finally:
            _replace(self.paths[chosen], self.contents[chosen])
        outcome.number = number
        return outcome


def _replace(path: Path, content: bytes) -> None:
    """Put a new file at `path`: an old one may still be memory-mapped and must not change."""
    temporary = path.with_name(f"{path.name}.new")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(content)
    temporary.replace(path)


def judge(read: Callable[[], Any]) -> Outcome:
    """Run `read` as a program would, and classify its exit code and message."""
    from clip_retrieval.errors import OUT_OF_MEMORY as OWN_OUT_OF_MEMORY
    from clip_retrieval.errors import run_with_exit_code
    from clip_retrieval.log import start_log

    _clear_caches()
    start_log()
    out, err = io.StringIO(), io.StringIO()
    code: object = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = run_with_exit_code(read)
    except SystemExit as exit:
        code = exit.code
    except BaseException as error:
        kind = MEMORY_OUT if _is_memory(error) else UNCAUGHT
        return Outcome(0, kind, _root(error), "".join(traceback.format_exception(error))[-6000:])

    # classify the exit code and the message
    message = [line for line in err.getvalue().splitlines() if not line.startswith("WARNING")]
    if code == 0:
        return Outcome(0, ACCEPTED)
    text = "\n".join(message)
    if OWN_OUT_OF_MEMORY[:13] in text:
        return Outcome(0, MEMORY_OUT, "out of memory", text)
    if code not in (2, 3) or len(message) != 1 or len(text) > LONGEST_MESSAGE + 60:
        return Outcome(0, UNCAUGHT, f"exit code {code}, {len(message)} lines, {len(text)} characters", text[:2000])
    return Outcome(0, REFUSED, text=text)


def _clear_caches() -> None:
    """Clear the caches of the readers, because each document is read as in a new run."""
    for name, module in list(sys.modules.items()):
        if name.startswith("clip_retrieval.data.readers"):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def _root(error: BaseException) -> str:
    """The type of the error, and the innermost functions of the package and of a library in its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "clip_retrieval" in frame.filename]
    places = [ours[-1]] if ours else []
    if frames and (not places or frames[-1] is not places[-1]):
        places.append(frames[-1])
    functions = ", ".join(f"{_short(frame.filename)}:{frame.name}" for frame in places)
    return f"{type(error).__name__} in {functions}"


def _short(file: str) -> str:
    for mark in ("site-packages/", "clip_retrieval/", "tests/", "lib/"):
        if mark in file:
            return file.rpartition(mark)[2]
    return file


def start(reader: Reader, folder: Path, seed: int, first: int, count: int) -> tuple[int, int]:
    """Fork a process that reads the mutations from `first` to `count` - 1; return its id and its pipe."""
    ours, theirs = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child:
        os.close(theirs)
        return child, ours
    os.close(ours)
    code = 1
    try:
        _serve(reader, folder, seed, range(first, count), theirs)
        code = 0
    finally:
        os._exit(code)


def _serve(reader: Reader, folder: Path, seed: int, numbers: range, pipe: int) -> None:
    # discard the warnings of C libraries
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        documents = Documents(reader, folder, seed)
        warm = [
            judge(lambda path=path: reader.read(path)).kind for path in documents.paths
        ]  # imports the modules that a first read needs
    if reader.accepts and set(warm) != {ACCEPTED}:
        raise AssertionError(f"{reader.name}: the valid documents are {warm}")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with os.fdopen(pipe, "w", buffering=1) as report:
        for number in numbers:
            report.write(f"{number}\n")
            outcome = documents.read(number)
            report.write(json.dumps(asdict(outcome)) + "\n")
            if number % 200 == 199:
                gc.collect()
