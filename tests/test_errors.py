"""One message on an error of several processes."""

import subprocess
import sys

from clip_retrieval.errors import INTERRUPTED, LOST_PROCESS
from tests.conftest import ROOT

FAIL = """
import sys
from clip_retrieval.errors import UserError, run_with_exit_code
def fail():
    raise UserError(sys.argv[1])
sys.exit(run_with_exit_code(fail))
"""


def fail(rank, message, attempt, stderr=subprocess.PIPE):
    """Fail as a process of torchrun; return the exit code and the output."""
    environment = {"RANK": str(rank)}
    if attempt is not None:
        (attempt / str(rank)).mkdir(parents=True, exist_ok=True)
        environment["TORCHELASTIC_ERROR_FILE"] = str(attempt / str(rank) / "error.json")
    command = [sys.executable, "-c", FAIL, message]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment, cwd=ROOT)
    return done.returncode, done.stderr


def test_processes_of_torchrun_print_one_message(tmp_path):
    first = tmp_path / "attempt_0"
    assert fail(1, "a.csv: no such file", first) == (2, "error (process 1): a.csv: no such file\n")
    for message in ("a.csv: no such file", LOST_PROCESS, INTERRUPTED):
        assert fail(0, message, first) == (2, "")
    # another error is not hidden, nor the same one after a restart
    assert fail(0, "disk full", first) == (2, "error (process 0): disk full\n")
    assert fail(0, "disk full", tmp_path / "attempt_1") == (2, "error (process 0): disk full\n")
    assert fail(0, LOST_PROCESS, tmp_path / "attempt_2")[1].startswith("error (process 0): another process")


def test_processes_of_other_launchers_print_their_messages(tmp_path):
    for rank in range(2):
        assert fail(rank, "disk full", None) == (2, f"error (process {rank}): disk full\n")


def test_process_without_output_leaves_the_message_to_another(tmp_path):
    """torchrun --local_ranks_filter discards the output of other processes."""
    assert fail(1, "disk full", tmp_path, stderr=subprocess.DEVNULL) == (2, None)
    assert fail(0, "disk full", tmp_path) == (2, "error (process 0): disk full\n")
