"""Run commands one after another, or one for each GPU, and pass stop signals on to them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from clip_retrieval.signals import StopSignal

POLL_SECONDS = 0.1


def run_all(
    commands: Mapping[str, Sequence[str]],
    outputs: Path,
    gpus: Sequence[str | None],
    stop: StopSignal,
    on_start: Callable[[str, Path], None],
    on_end: Callable[[str, int], None],
) -> None:
    """Run each command, with at most one at a time on each of `gpus`, and its output in `outputs`/NAME.txt.

    A command that fails does not stop the others. Raises KeyboardInterrupt after a stop signal, which is passed on as
    SIGTERM, once the commands in progress have ended.

    Args:
        commands: by name, in their order.
        outputs: an existing folder.
        gpus: values of CUDA_VISIBLE_DEVICES; (None,) leaves it as it is.
        stop: the signals of this program.
        on_start: called with the name and the file of the output.
        on_end: called with the name and the exit code.
    """
    waiting, free = list(commands.items()), list(gpus)
    running: dict[str, tuple[subprocess.Popen, str | None]] = {}
    try:
        while waiting or running:
            stop.check()
            # start a command on each free GPU
            while waiting and free:
                name, command = waiting.pop(0)
                gpu, output = free.pop(0), outputs / f"{name}.txt"
                environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})
                with output.open("ab") as file:
                    # in a session of its own, so that Ctrl-C in the terminal arrives once
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=file,
                        env=environment,
                        start_new_session=True,
                    )
                running[name] = (process, gpu)
                on_start(name, output)
            # report those that have ended
            time.sleep(POLL_SECONDS)
            for name in [name for name, (process, _) in running.items() if process.poll() is not None]:
                process, gpu = running.pop(name)
                free.append(gpu)
                on_end(name, process.returncode)
    finally:
        for process, _ in running.values():
            process.terminate()
        for name, (process, _) in running.items():
            on_end(name, process.wait())


def last_line(path: Path) -> str:
    """Return the last line of a run's output that is not empty, which is the message of a failed run."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
