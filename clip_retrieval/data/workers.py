"""Processes that load data ahead, and their default number."""

from __future__ import annotations

import atexit
import contextlib
import errno
import multiprocessing
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, dataloader, get_worker_info

from clip_retrieval.data.images.decode import image_pixels_limit, limit_image_pixels
from clip_retrieval.data.shared_memory import make_loading_error, share
from clip_retrieval.errors import LOST_WORKER, RunError, UserError
from clip_retrieval.signals import STOP_SIGNALS, ignore_first_signal

warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than cores, if the user asks for them


LOADER_NICENESS = 5
"""Added to the niceness of loader processes, so that the training process runs first."""


class _Failed:
    """An error of a worker, for the main process to raise (the loader would hide it in a traceback)."""

    def __init__(self, error: UserError | RunError):
        self.kind = RunError if isinstance(error, RunError) else UserError
        self.message = str(error)

    def pin_memory(self) -> _Failed:
        return self


class _Fetch(Dataset):
    def __init__(self, fetch: Callable[[Any], Any]):
        self.fetch = fetch

    def __getitem__(self, request: Any) -> Any:
        try:
            result = self.fetch(request)
            return share(result) if get_worker_info() else result
        except (UserError, RunError) as error:
            return _Failed(error)


class _Requests:
    """The next requests to the workers, as a sampler."""

    current: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.current)


class Workers:
    """Processes that compute fetch(request) ahead and in order, for one list of requests after another.

    Args:
        fetch: the function to compute; its UserError or RunError is raised when the result is read.
        num_workers: number of processes; with 0 the calling process computes.
        pin_memory: copy tensors to pinned memory, for quick copies to a GPU.
        stay: keep the processes for the next list of requests.
    """

    def __init__(self, fetch: Callable[[Any], Any], *, num_workers: int, pin_memory: bool = False, stay: bool = True):
        if num_workers:
            atexit.register(_end_children)
        self._requests = _Requests()
        self._loader = DataLoader(
            _Fetch(fetch),
            sampler=self._requests,
            batch_size=None,
            collate_fn=_identity,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=stay and num_workers > 0,
            worker_init_fn=partial(_begin_worker, pixels=image_pixels_limit()),
            generator=torch.Generator(),  # its own: loading must not change the random state of training
        )

    def __call__(self, requests: Iterable[Any]) -> Iterator[Any]:
        """Yield the results, in the order of the requests. Raises RunError if a worker is lost or cannot start."""
        self._requests.current = requests
        guard = _report_lost_workers if self._loader.num_workers else contextlib.nullcontext
        with guard():
            try:
                with _hold_signals():  # until new processes can handle them
                    results = iter(self._loader)
            except BaseException as error:
                for frame, _ in traceback.walk_tb(error.__traceback__):
                    _abandon_iterator(frame.f_locals.get("self"))
                if isinstance(error, OSError):  # of the semaphores and pipes between the processes
                    raise make_loading_error(error) from error
                raise
        while True:
            with guard():
                try:
                    result = next(results, _END)
                except BaseException:
                    # a lost worker or a signal: torch's own shutdown would wait for the workers, or raise again
                    self._loader._iterator = None
                    _abandon_iterator(results)
                    raise
            if result is _END:
                return
            if isinstance(result, _Failed):
                raise result.kind(result.message)
            yield result


_END = object()
_NO_DESCRIPTORS = ("Too many open files", "items of ancdata")  # messages of torch and multiprocessing


@contextlib.contextmanager
def _report_lost_workers() -> Iterator[None]:
    """Raise RunError for a lost worker within this block, and only there.

    torch's handler of SIGCHLD raises anywhere in the main process, even while it writes a checkpoint. Here it runs in
    such blocks only: at the beginning, for a worker that was lost since the last block, and at the signal.
    """
    global _waiting
    _waiting = True
    try:
        _check_workers()
        yield
    except (ConnectionError, EOFError) as error:
        raise RunError(LOST_WORKER) from error
    except (OSError, RuntimeError) as error:
        if str(error).startswith(("DataLoader worker (pid", "Pin memory thread exited")):
            raise RunError(LOST_WORKER) from error
        if getattr(error, "errno", None) == errno.EMFILE or any(sign in str(error) for sign in _NO_DESCRIPTORS):
            raise make_loading_error(OSError(errno.EMFILE, os.strerror(errno.EMFILE))) from error
        raise
    finally:
        _waiting = False
        _replace_torch_handler()


_waiting = False
_torch_handler: Callable[[int, FrameType | None], None] | None = None


def _replace_torch_handler() -> None:
    """Replace torch's handler, which torch sets when it first starts workers, by `_on_child_exit`."""
    global _torch_handler
    current = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    if callable(current) and current is not _on_child_exit and "torch" in getattr(current, "__module__", ""):
        _torch_handler = current
        signal.signal(signal.SIGCHLD, _on_child_exit)


def _on_child_exit(number: int, frame: FrameType | None) -> None:
    if _waiting:
        _check_workers()


def _check_workers() -> None:
    if _torch_handler is not None:
        _torch_handler(signal.SIGCHLD, None)


@contextlib.contextmanager
def _hold_signals() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM in processes that start in this block; in this one, deliver them after it.

    (A blocked signal would go to another thread, and be handled in the main one at once.)
    """
    if threading.current_thread() is not threading.main_thread():  # which alone handles signals
        yield
        return
    held: list[int] = []
    before = {number: signal.signal(number, lambda number, _: held.append(number)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for received in held:
            signal.raise_signal(received)


def _abandon_iterator(iterator: object) -> None:
    """Kill the workers of torch's iterator, and mark it as shut down. It may be incomplete, and its __del__ is not."""
    if isinstance(iterator, dataloader._MultiProcessingDataLoaderIter):
        iterator._shutdown = True
        if getattr(iterator, "_worker_pids_set", False):
            # torch's own shutdown, interrupted by the loss of another worker, may have removed them already
            with contextlib.suppress(ValueError):
                dataloader._utils.signal_handling._remove_worker_pids(id(iterator))
        for worker in getattr(iterator, "_workers", ()):
            worker.kill()


def _begin_worker(worker: int, pixels: int) -> None:
    ignore_first_signal(worker)
    if hasattr(os, "nice"):
        os.nice(LOADER_NICENESS)
    limit_image_pixels(pixels)  # a spawned process has the default


def _end_children() -> None:
    """Kill the remaining loader processes at the end of this one.

    Python would send each a signal that `ignore_first_signal` ignores, and then wait forever.
    """
    for child in multiprocessing.active_children():
        child.kill()


def _identity(item: Any) -> Any:
    return item


def map_in_workers(
    fetch: Callable[[Any], Any], requests: Iterable[Any], *, num_workers: int, pin_memory: bool = False
) -> Iterator[Any]:
    """Yield fetch(request) for each request, in order, computed ahead in worker processes; see `Workers`."""
    return Workers(fetch, num_workers=num_workers, pin_memory=pin_memory, stay=False)(requests)


def default_num_workers(device: torch.device) -> int:
    """Return the default number of loader processes for each training process on this machine.

    With a GPU two cores stay free, one for the training process, which launches its kernels, and one for its backward
    pass: a GPU that waits for launches costs more than a loader process brings.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # cores per process of torchrun
    # On a CPU, loading and computing share the cores.
    return min(16, max(1, cores - 2)) if device.type != "cpu" else min(8, max(1, cores // 2))
