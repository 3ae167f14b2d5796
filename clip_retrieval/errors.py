"""Errors that end a program with one line and an exit code.

`run_with_exit_code` prints the message on standard error, without a traceback, and returns the error's exit code.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

OUT_OF_MEMORY = (
    "out of memory in the model; use --grad_cache or a smaller one, --grad_checkpointing, or a smaller "
    "--eval_batch_size (resume a finetune with --resume auto)"
)
OUT_OF_MEMORY_READING = "out of memory while reading files; close other programs, or use a machine with more memory"
LOST_PROCESS = "another process of this run was lost (if it was not killed, see its message); resume with --resume auto"
INTERRUPTED = "interrupted"
LOST_WORKER = (
    "a process that loads images was lost (killed, or out of memory); resume with --resume auto and fewer --num_workers"
)


# Faults of a disk or its file system, not of the input.
DISK_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than allowed",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "a disk error occurred",
    errno.ESTALE: "the network file system has lost the file",
}
LONGEST_MESSAGE = 500  # characters
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")


class UserError(Exception):
    """Bad usage or bad input. The message names the file, line, option or value, and the remedy."""

    exit_code = 2


class NotFiniteError(UserError):
    """A feature is not finite. A finetune raises RunError instead."""


class RunError(Exception):
    """A run that cannot continue (loss not finite, out of memory, disk full). The message tells how to resume."""

    exit_code = 3


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after the run was saved. The message tells how to resume."""

    exit_code = 130


def run_with_exit_code(run: Callable[[], int | None]) -> int:
    """Run a program and return its exit code. An error is one line on standard error.

    0: done; 2: bad usage or input; 3: the run cannot continue; 130: interrupted. A bug keeps its traceback and
    Python's exit code 1.
    """
    # Threads that wait for each other sleep instead of spinning: on a CPU that other programs use too, spinning makes a
    # training step more than ten times slower. OpenMP reads this when `run` loads torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for captions that the terminal cannot encode
    try:
        return run() or 0
    except (UserError, RunError, Interrupted) as error:
        return _report(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _report(INTERRUPTED, Interrupted.exit_code)
    except MemoryError:
        return _report(OUT_OF_MEMORY_READING, RunError.exit_code)
    except BrokenPipeError:
        silence(sys.stdout)
        return 0
    except OSError as error:
        # numpy's error for a full disk has no errno.
        if error.errno in DISK_FAULTS or (error.errno is None and error.filename is not None):
            fault = DISK_FAULTS.get(error.errno or 0) or describe(error)
            place = error.filename or "a file"
            return _report(f"{place}: {fault}; fix that and repeat the command (a finetune with --resume auto)", 3)
        if error.filename is not None:
            return _report(f"{error.filename}: {describe(error)}; check the name and the permissions", 2)
        raise
    except RuntimeError as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            return _report(OUT_OF_MEMORY, RunError.exit_code)
        if any(word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer")):
            return _report(LOST_PROCESS, RunError.exit_code)
        raise


def one_line(message: str, limit: int = LONGEST_MESSAGE) -> str:
    """Return the message as one printable line of at most `limit` characters.

    The middle of a longer message is cut: it begins with the file and ends with the remedy.
    """
    text = printable(" ".join(message.splitlines())).replace("\t", " ")
    if len(text) <= limit:
        return text
    head, tail = (limit - 3) * 2 // 3, (limit - 3) - (limit - 3) * 2 // 3
    return f"{text[:head]}...{text[-tail:]}"


def printable(text: str) -> str:
    """Escape control characters and half surrogate pairs; line breaks and tabs stay."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def format_counts(**counts: int) -> str:
    """Return numbers with their nouns: `format_counts(image=1, caption=2000)` is `1 image, 2,000 captions`."""
    return ", ".join(format_count(number, noun) for noun, number in counts.items())


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun: `2 classes`, `1 image feature`."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def format_share(number: int, total: int, noun: str) -> str:
    """Return a part of a number with its noun and verb: `1 of 26 images is`, `26 of 26 images are`."""
    return f"{number:,} of {format_count(total, noun)} {'is' if number == 1 else 'are'}"


def describe(error: BaseException) -> str:
    """Return the first line of a library's error, or the error's type if it has no message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def silence(stream: TextIO) -> None:
    """Discard further output to `stream`, whose reader has exited (`| head`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def reports_error(message: str) -> bool:
    """Whether this process prints its error. Of the processes of torchrun on a machine, the first one does.

    Other processes fail with the same message, or because the first one is lost.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../attempt_0/{local rank}/error.json
    if not error_file:
        return True
    attempt = Path(error_file).parent.parent
    try:
        # torchrun --local_ranks_filter discards the output of a process: another one prints the message
        if os.path.samestat(os.fstat(2), Path(os.devnull).stat()):
            return True
        if message in (LOST_PROCESS, INTERRUPTED) and any(attempt.glob("reported-*")):
            return False
        path = attempt / f"reported-{zlib.crc32(message.encode(errors='backslashreplace')):08x}"
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:  # the folder is not torchrun's
        return True
    return True


def _report(message: str, code: int) -> int:
    message = one_line(message)
    if "RANK" not in os.environ:
        print(f"error: {message}", file=sys.stderr)
        return code
    # With several processes: exit at once. Threads that wait for the others would block a normal exit.
    if reports_error(message):
        print(f"error (process {os.environ['RANK']}): {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
