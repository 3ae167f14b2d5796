"""Run the program in a separate process that starts in a fraction of a second, because its imports are done.

A server process imports the package once and forks for each run (multiprocessing's forkserver). The forked process can
be killed, interrupted, run out of memory or hang like any other.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
PRELOAD = "tests.faults.preload"
QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@dataclass(frozen=True)
class Settings:
    """Settings of a process before the program starts.

    Attributes:
        folder: its working directory.
        memory: limit in bytes, beyond the initial address space.
        environment: environment variables to set.
        before: called with `arguments` in the process, before the program; may inject faults.
        arguments: arguments of `before`.
    """

    folder: Path
    memory: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    before: Callable[..., None] | None = None
    arguments: tuple[Any, ...] = ()


@dataclass
class Ended:
    """A program that has ended.

    Attributes:
        code: exit code; negative for a signal; None if the program was still running at the deadline.
        out, err: standard output and standard error.
        seconds: wall time.
    """

    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The lines on standard error that are not warnings."""
        return [line for line in self.err.splitlines() if not line.startswith("WARNING")]


class Program:
    """A running main.py, or a script.

    Args:
        typed: the arguments of the command line.
        settings: settings of the process.
        script: path of the program, relative to the project.
    """

    _number = 0

    def __init__(self, typed: Sequence[object], settings: Settings, script: str = "main.py"):
        Program._number += 1
        # Outside of the folder, because a run may fill its disk or list its files.
        self._files = [settings.folder.parent / f".{os.getpid()}-{Program._number}.{name}" for name in ("out", "err")]
        for file in self._files:
            file.touch()
        words = [os.fsdecode(word) if isinstance(word, bytes) else str(word) for word in typed]
        self._process = _server().Process(target=_run, args=(script, words, self._files, settings))
        self._started = time.perf_counter()
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    def send(self, number: int, *, to_group: bool = False) -> None:
        """Send a signal to the process, or to all processes of its group."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if to_group else os.kill)(self.pid, number)

    def wait(self, deadline: float = 60.0) -> Ended:
        """Wait for the end; kill the process and its children at the deadline (seconds)."""
        self._process.join(deadline)
        code = self._process.exitcode
        if code is None:
            self.send(signal.SIGKILL)
        self.send(signal.SIGKILL, to_group=True)
        self._process.join()
        out, err = (file.read_bytes().decode(errors="backslashreplace") for file in self._files)
        for file in self._files:
            file.unlink()
        return Ended(code, out, err, time.perf_counter() - self._started)


def run(typed: Sequence[object], settings: Settings, script: str = "main.py", deadline: float = 60.0) -> Ended:
    """Run the program to its end."""
    return Program(typed, settings, script).wait(deadline)


def call(function: Callable[..., Any], *arguments: Any, deadline: float = 300.0) -> Any:
    """Call a function in a separate process and return its result.

    Raises RuntimeError if there is none before the deadline (seconds).
    """
    context = _server()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        if not ours.poll(deadline):
            raise RuntimeError(f"{function.__name__} takes more than {deadline:g} s")
        return ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__name__} ended with code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _send(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(function(*arguments))
    pipe.close()


def _server() -> Any:
    os.environ.update(QUIET)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    return context


def _run(script: str, words: list[str], files: list[Path], settings: Settings) -> None:
    """The forked process: set it up, run the program, exit."""
    # standard streams, folder and environment
    multiprocessing.set_start_method(None, force=True)  # loaders start as in a normal run
    with contextlib.suppress(OSError):
        os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(settings.folder)
    os.environ.update(QUIET | settings.environment)

    # limits and faults
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if settings.memory is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + settings.memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if settings.before is not None:
        settings.before(*settings.arguments)

    # the program
    path = ROOT / script
    sys.argv = [str(path), *words]
    sys.path.insert(0, str(path.parent))
    code: object = 1
    try:
        runpy.run_path(str(path), run_name="__main__")
        code = 0
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
    _end(code if isinstance(code, int) else code is not None)


def _end(code: int) -> NoReturn:
    """Exit as the interpreter does, because a process of multiprocessing would skip the functions of atexit."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
