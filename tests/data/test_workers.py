"""Loader processes: shared results, their use of /dev/shm, and the detection of lost ones."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader, dataloader

from clip_retrieval.data import shared_memory
from clip_retrieval.data.images.decode import image_pixels_limit, limit_image_pixels
from clip_retrieval.data.workers import (
    LOADER_NICENESS,
    Workers,
    _abandon_iterator,
    default_num_workers,
    map_in_workers,
)
from clip_retrieval.errors import RunError, UserError
from tests.conftest import ROOT


class Result(NamedTuple):
    images: torch.Tensor
    rest: tuple


def compute(number):
    """Return a result with tensors of several kinds."""
    odd = torch.arange(24).reshape(4, 6)[:, number % 3 :: 2] + number  # not contiguous
    return Result(
        torch.full((number + 1, 3, 8, 8), number, dtype=torch.uint8), (odd, torch.empty(0, 5), [number], str(number))
    )


def is_result(result, number):
    images, (odd, empty, *rest) = result
    expected = compute(number)
    assert torch.equal(images, expected.images) and torch.equal(odd, expected.rest[0])
    return empty.shape == (0, 5) and rest == [[number], str(number)]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_results_are_the_same_for_any_number_of_processes(number):
    found = list(map_in_workers(compute, range(20), num_workers=number))
    assert len(found) == 20 and all(map(is_result, found, range(20)))


def test_loader_processes_run_at_a_lower_priority():
    (niceness,) = map_in_workers(lambda increment: os.nice(increment), [0], num_workers=1)
    assert niceness == min(19, os.nice(0) + LOADER_NICENESS)


@pytest.mark.parametrize(
    "device, cores, processes, expected",
    [("cuda", 16, 1, 14), ("cuda", 2, 1, 1), ("cuda", 64, 8, 6), ("cuda", 64, 1, 16), ("cpu", 8, 1, 4)],
)
def test_default_number_leaves_cores_for_training(monkeypatch, device, cores, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_num_workers(torch.device(device)) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_freshly_forked_worker_is_ignored(monkeypatch, number):
    fork = os.fork

    def fork_and_signal():
        child = fork()
        if child == 0:
            os.kill(os.getpid(), number)
        return child

    monkeypatch.setattr(os, "fork", fork_and_signal)
    found = list(map_in_workers(compute, range(8), num_workers=2))
    assert len(found) == 8 and all(map(is_result, found, range(8)))


def test_a_worker_lost_while_others_start_is_one_line():
    code = """
        import os, time
        from torch.utils.data import dataloader
        fork, children = os.fork, []
        def fork_and_kill():
            child = fork()
            if child:
                children.append(child)
                if len(children) == 2:
                    os.kill(children[0], 9)
                    time.sleep(0.5)
                    raise RuntimeError(f"DataLoader worker (pid {children[0]}) is killed by signal: Killed.")
            return child
        os.fork = fork_and_kill
        workers = 2
    """
    code, err = in_small_shm("64m", code)
    assert code == 3 and err.count("\n") == 1 and "was lost" in err, err


def test_a_signal_reaches_the_main_process_after_workers_start(monkeypatch):
    fork, received = os.fork, []
    before = signal.signal(signal.SIGINT, lambda *_: received.append(len(forked)))
    forked = []

    def signal_and_fork():
        os.kill(os.getpid(), signal.SIGINT)
        forked.append(fork())
        return forked[-1]

    monkeypatch.setattr(os, "fork", signal_and_fork)
    try:
        found = list(map_in_workers(compute, range(8), num_workers=2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(found) == 8 and received == [2, 2]  # not before both workers had started


def test_results_are_independent_of_each_other():
    first, second, *_ = map_in_workers(compute, range(12), num_workers=2)
    first.images.fill_(77)
    assert is_result(second, 1)


def test_results_are_not_in_dev_shm(monkeypatch):
    if not hasattr(os, "memfd_create"):
        pytest.skip("only Linux has memfd_create")
    monkeypatch.setattr(torch.UntypedStorage, "_new_using_fd_cpu", None)  # torch's way to make a file there
    storage = shared_memory.share(torch.ones(1000)).untyped_storage()
    assert str(Path(f"/proc/self/fd/{storage._share_fd_cpu_()[0]}").readlink()).startswith("/memfd:")


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM])
def test_the_fallback_without_anonymous_files(monkeypatch, error):
    def forbidden(name):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "memfd_create", forbidden, raising=False)
    assert is_result(shared_memory.share(compute(3)), 3)
    assert list(map_in_workers(compute, [1, 2], num_workers=1))[1].images.max() == 2


def test_a_result_leaves_no_file_open():
    count = len(list(Path("/dev/fd").iterdir()))
    for number in range(50):
        shared_memory.share(compute(number))
    assert len(list(Path("/dev/fd").iterdir())) <= count + 2


def fails(kind):
    if kind == "user":
        raise UserError("a.jpg: not a readable image")
    raise RunError("a.jpg: out of memory")


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(("kind", "error"), [("user", UserError), ("run", RunError)])
def test_an_error_keeps_its_kind_and_its_text(number, kind, error):
    with pytest.raises(error, match=r"^a\.jpg: "):
        list(map_in_workers(fails, [kind], num_workers=number))


def wrong(number):
    raise RuntimeError("a bug") if number else OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("request_", [0, 1])
def test_a_bug_in_a_process_is_not_a_lost_process(number, request_):
    with pytest.raises((OSError, RuntimeError), match=r"a bug|No space left"):
        list(map_in_workers(wrong, [request_], num_workers=number))


def limit(number):
    return image_pixels_limit()


def test_the_pixel_limit_reaches_the_processes():
    default = image_pixels_limit()
    limit_image_pixels(1234)
    workers = Workers(limit, num_workers=1)
    limit_image_pixels(default)  # as in a spawned process
    assert list(workers([0])) == [1234]


# Lost processes


def slow(number):
    time.sleep(0.01)
    return number


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV])
def test_a_lost_process_is_reported_when_results_are_read(kill):
    workers = Workers(slow, num_workers=2)
    results = workers(range(1000))
    next(results)
    saved = []
    os.kill(workers._loader._iterator._workers[1].pid, kill)
    for _ in range(10):  # work that must not be interrupted, such as saving a checkpoint
        time.sleep(0.02)
        saved.append(1)
    started = time.perf_counter()
    with pytest.raises(RunError, match=r"a process that loads images was lost.*--num_workers"):
        list(results)
    assert len(saved) == 10 and time.perf_counter() - started < 3


def dies(number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_lost_during_a_wait_is_reported_at_once():
    started = time.perf_counter()
    with pytest.raises(RunError, match="a process that loads images was lost"):
        list(map_in_workers(dies, range(3), num_workers=1))
    assert time.perf_counter() - started < 3


def test_other_processes_may_end_during_a_wait():
    others = [subprocess.Popen(["sh", "-c", f"sleep 0.0{i}; exit {i}"]) for i in range(1, 5)]
    assert list(map_in_workers(slow, range(30), num_workers=1)) == list(range(30))
    assert [other.wait() for other in others] == [1, 2, 3, 4]


# /dev/shm


def in_small_shm(size, code):
    """Run code, with an `images` that returns 4 MB, in a process whose /dev/shm has this size."""
    setup = """
        import sys, torch
        from clip_retrieval.data import shared_memory
        from clip_retrieval.data.workers import map_in_workers
        from clip_retrieval.errors import run_with_exit_code
        def images(number):
            return torch.full((64, 3, 148, 148), number, dtype=torch.uint8)
        def run():
            found = [int(part.max()) for part in map_in_workers(images, range(12), num_workers=workers)]
            assert found == list(range(12))
    """
    code = f"{textwrap.dedent(setup)}\n{textwrap.dedent(code)}\nsys.exit(run_with_exit_code(run))"
    mount = (
        f"mount -t tmpfs -o size={size} tmpfs /dev/shm || exit 99; exec timeout -k 3 60 {sys.executable} -c '{code}'"
    )
    try:
        done = subprocess.run(["unshare", "-m", "bash", "-c", mount], capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if done.returncode == 99 or "unshare failed" in done.stderr:
        pytest.skip("a /dev/shm of its own is not permitted here")
    return done.returncode, done.stderr


def test_a_small_dev_shm_is_enough():
    assert in_small_shm("256k", "workers = 3") == (0, "")


@pytest.mark.parametrize(
    ("size", "code"),
    [
        *((f"{size}k", "workers = 3") for size in (4, 16, 28, 48)),  # too small even for semaphores
        ("256k", "workers = 3; del shared_memory.os.memfd_create"),  # as on systems without it
    ],
)
def test_a_dev_shm_that_is_too_small_is_one_line(size, code):
    code, err = in_small_shm(size, code)
    assert code == 3 and err.count("\n") == 1, err
    assert all(word in err for word in ("/dev/shm", "--num_workers 0", "--shm-size"))


def test_too_many_open_files_are_one_line():
    code = """
        import resource, os
        os.memfd_create  # each result has a descriptor
        kept = []
        def run():
            resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
            for part in map_in_workers(images, range(300), num_workers=2):
                kept.append(part)
        workers = 2
    """
    code, err = in_small_shm("64m", code)
    assert code == 3 and err.count("\n") == 1 and "ulimit -n" in err, err


def test_workers_that_torch_began_to_shut_down_can_be_abandoned():
    iterator = iter(DataLoader([0, 1], batch_size=None, num_workers=1))
    dataloader._utils.signal_handling._remove_worker_pids(id(iterator))
    _abandon_iterator(iterator)
    for process in iterator._workers:
        process.join(timeout=30)
        assert process.exitcode == -signal.SIGKILL
