"""Processes that load data ahead, and how many of them there are."""

from __future__ import annotations

import atexit
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from clip_retrieval.data.pixels import Pixels
from clip_retrieval.errors import LOST_WORKER, RunError, UserError
from clip_retrieval.signals import outlive_first_signal


class _Failed:
    """An error from a worker, carried to the main process whole (the loader would bury it in a traceback)."""

    def __init__(self, error: UserError):
        self.message = str(error)

    def pin_memory(self) -> _Failed:
        return self


class _Fetch(Dataset):
    def __init__(self, fetch: Callable[[Any], Any]):
        self.fetch = fetch

    def __getitem__(self, request: Any) -> Any:
        try:
            return self.fetch(request)
        except UserError as error:
            return _Failed(error)


class _Requests:
    """What the workers are asked for next."""

    now: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.now)


class Workers:
    """Processes that compute fetch(request), in order and ahead, for one list of requests after another.

    Args:
        fetch: what they compute; a UserError in it is raised where the result is asked for.
        num_workers: how many; with 0 the calling process computes.
        pin_memory: prepare tensors for quick copies to a GPU.
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
            collate_fn=_as_it_is,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=stay and num_workers > 0,
            worker_init_fn=outlive_first_signal,
            generator=torch.Generator(),  # its own: loading must not move the random state that training uses
        )

    def __call__(self, requests: Iterable[Any]) -> Iterator[Any]:
        self._requests.now = requests
        results = iter(self._loader)
        while True:
            try:
                result = next(results)
            except StopIteration:
                return
            except (ConnectionError, EOFError) as error:
                raise RunError(LOST_WORKER) from error
            if isinstance(result, _Failed):
                raise UserError(result.message)
            yield result


def _end_children() -> None:
    """Ends the loading processes that are left when this one ends.

    Python itself would ask each to end, which `outlive_first_signal` is deaf to, and then wait for it for ever.
    """
    for child in multiprocessing.active_children():
        child.kill()


def _as_it_is(item: Any) -> Any:
    return item


def in_workers(
    fetch: Callable[[Any], Any], requests: Iterable[Any], *, num_workers: int, pin_memory: bool = False
) -> Iterator[Any]:
    """fetch(request) for each request, in order, computed ahead in worker processes.

    A UserError of a worker is raised here, whole.
    """
    return Workers(fetch, num_workers=num_workers, pin_memory=pin_memory, stay=False)(requests)


def choose_num_workers(asked: int | None, pixels: Pixels, device: torch.device) -> int:
    """`asked`, or what suits the images and the device: none where the images are in memory already."""
    if asked is not None:
        return asked
    return 0 if pixels.in_memory else usual_num_workers(device)


def usual_num_workers(device: torch.device) -> int:
    """Processes that load images, in each of the training processes on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # of each process that torchrun started here
    # On a CPU, loading and computing share the cores.
    return min(16, cores) if device.type != "cpu" else min(8, max(1, cores // 2))
