"""What a user did wrong, or what stopped a run, said in one line.

`main` prints the message on standard error, without a traceback, and exits with the error's code.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from typing import TextIO

OUT_OF_MEMORY = (
    "out of memory while the model computes; choose --grad_cache or a smaller one, --grad_checkpointing, or a smaller "
    "--eval_batch_size (a finetune is resumed with --resume auto)"
)
OUT_OF_MEMORY_READING = "out of memory; the machine has too little for these files, or other programs use it"
LOST_PROCESS = (
    "another process of this run was lost (its own message says why, unless it was killed); go on with --resume auto"
)
LOST_WORKER = (
    "a process that loads images was lost (killed, or out of memory); go on with --resume auto and fewer --num_workers"
)


# Faults of a disk or its file system, not of the user's input.
DISK_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than allowed here",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk reports an error",
    errno.ESTALE: "the network file system has lost it",
}
LONGEST_MESSAGE = 500  # characters
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")


class UserError(Exception):
    """Bad usage or bad input: names the thing (file, line, option, value) and the mend."""

    exit_code = 2


class NotFiniteError(UserError):
    """A feature that is not finite. In a finetune it is the run's, not the user's."""


class RunError(Exception):
    """A run that could not go on (loss not finite, out of memory, disk full), with the mend and how to resume."""

    exit_code = 3


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after the run was saved; the message says how to resume."""

    exit_code = 130


def run_and_exit(run: Callable[[], int | None]) -> int:
    """Run a program and return its exit code; what went wrong is one line on standard error.

    0 done; 2 bad usage or input; 3 the run could not go on; 130 interrupted. A bug keeps its traceback and exits
    with Python's 1.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name or a caption that the terminal cannot show
    try:
        return run() or 0
    except (UserError, RunError, Interrupted) as error:
        return _say(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _say("interrupted", Interrupted.exit_code)
    except MemoryError:
        return _say(OUT_OF_MEMORY_READING, RunError.exit_code)
    except BrokenPipeError:
        silence(sys.stdout)
        return 0
    except OSError as error:
        # (numpy's errors of a full disk have no number.)
        if error.errno in DISK_FAULTS or (error.errno is None and error.filename is not None):
            fault = DISK_FAULTS.get(error.errno) or describe(error)
            place = error.filename or "a file"
            return _say(f"{place}: {fault}; mend that and repeat the command, a finetune with --resume auto", 3)
        if error.filename is not None:
            return _say(f"{error.filename}: {describe(error)}; check the name, and that it can be read or written", 2)
        raise
    except RuntimeError as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            return _say(OUT_OF_MEMORY, RunError.exit_code)
        if any(sign in str(error) for sign in ("gloo", "NCCL", "Connection closed by peer")):
            return _say(LOST_PROCESS, RunError.exit_code)
        raise


def one_line(message: str, limit: int = LONGEST_MESSAGE) -> str:
    """The message as one printable line of at most `limit` characters, whatever the file names in it contain.

    A longer message loses its middle: it begins with the file and ends with the remedy.
    """
    text = printable(" ".join(message.splitlines())).replace("\t", " ")
    if len(text) <= limit:
        return text
    head, tail = (limit - 3) * 2 // 3, (limit - 3) - (limit - 3) * 2 // 3
    return f"{text[:head]}...{text[-tail:]}"


def printable(text: str) -> str:
    """The text with escapes for control characters and half surrogate pairs; line breaks and tabs stay."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def describe(error: BaseException) -> str:
    """Why a library refused its input, for a message: the first line of what it says, or the name of the error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    return text.splitlines()[0] if text.strip() else type(error).__name__


def silence(stream: TextIO) -> None:
    """Let nobody hear what is written to `stream` from here on: its reader has gone (`| head`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(message: str, code: int) -> int:
    message = one_line(message)
    if "RANK" not in os.environ:
        print(f"error: {message}", file=sys.stderr)
        return code
    # One of several processes: the others, and threads that wait for them, must not keep this one from ending.
    print(f"error (process {os.environ['RANK']}): {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
