"""Run commands one after another, or one for each set of GPUs, and pass stop signals on to them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from clip_retrieval.errors import UserError, format_count
from clip_retrieval.signals import StopSignal

POLL_SECONDS = 0.1
PROMPT = "$ "  # before the command of each attempt in an output
TAIL_BYTES = 16_384  # of an output, for torchrun's report of a failure


def launch(script: Path, processes: int = 1) -> list[str]:
    """Return the command of a script: torchrun's if it has several processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(torchrun if processes > 1 else []), str(script)]


def group_gpus(gpus: Sequence[str], processes: int) -> list[str]:
    """Return the GPUs of each run that is in progress at a time, as CUDA_VISIBLE_DEVICES: one for each process.

    Raises UserError unless the number of GPUs is a multiple of the processes.
    """
    if len(gpus) % processes:
        raise UserError(
            f"--gpus {','.join(gpus)}: {format_count(len(gpus), 'GPU')} for runs of {processes} processes "
            f"(--nproc_per_node); give a multiple of {processes}"
        )
    return [",".join(gpus[start : start + processes]) for start in range(0, len(gpus), processes)]


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
                    file.write(f"{PROMPT}{shlex.join(command)}\n".encode(errors="backslashreplace"))
                    file.flush()
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


def failure_message(path: Path) -> str:
    """Return the message of a failed run, at the end of its output: the last line that is not empty.

    torchrun adds its own lines behind the message of a process.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    start = max((number for number, line in enumerate(lines, 1) if line.startswith(PROMPT)), default=0)
    lines = lines[start:]  # of the last attempt
    messages = [line for line in lines if line.startswith("error (process ")]
    return (messages or lines or [""])[-1]
