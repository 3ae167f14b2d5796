"""What a user did wrong, or what stopped a run, said in one line.

`main` prints the message on standard error, without a traceback, and exits with the error's code.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad usage or bad input: names the thing (file, line, option, value) and the mend."""

    exit_code = 2


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
    try:
        return run() or 0
    except (UserError, RunError, Interrupted) as error:
        return _say(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _say("interrupted", Interrupted.exit_code)
    except BrokenPipeError:
        raise
    except MemoryError:
        return _say("out of memory; choose a smaller --batch_size or --eval_batch_size", RunError.exit_code)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _say(f"disk full while writing {error.filename or 'a file'}; free some space", RunError.exit_code)
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            return _say(f"{error.filename}: {error.strerror}; choose a place that can be read and written", 2)
        raise
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error):
            return _say(
                "out of GPU memory; choose a smaller --batch_size or --eval_batch_size, a larger --accum_freq, or "
                "--grad_checkpointing",
                RunError.exit_code,
            )
        raise


def _say(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
