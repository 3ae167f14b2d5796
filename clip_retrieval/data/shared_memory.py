"""Tensors in memory that loader processes share with the main process."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_retrieval.errors import RunError

SHARED_MEMORY = Path("/dev/shm")


def share(value: Any) -> Any:
    """Copy the tensors of a value, also those in tuples, to memory that another process can map.

    torch would copy them to a file in /dev/shm, which has 64 MB in a Docker container, and would silently drop a batch
    that does not fit. Linux has anonymous memory files (`memfd_create`) without that limit; on other systems torch's
    way is the fallback.

    Raises RunError if the memory is full, or too many files are open.
    """
    if isinstance(value, tuple):
        parts = map(share, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if not isinstance(value, Tensor) or value.numel() == 0:
        return value
    try:
        return _copy_to_shared_memory(value)
    except OSError as error:
        raise make_loading_error(error) from None
    except RuntimeError as error:  # raised by torch if /dev/shm is full
        if "shared memory" not in str(error) and "mmap" not in str(error):
            raise
        raise make_loading_error(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from None


def _copy_to_shared_memory(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    descriptor = _open_memory_file()
    if descriptor is None:
        return tensor.share_memory_()
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        rest = tensor.view(-1).view(torch.uint8).numpy().data
        while rest:  # write() instead of a mapping: no page faults, and an error if the memory is full
            rest = rest[file.write(rest) :]
        # duplicates the descriptor
        storage = torch.UntypedStorage._new_shared_fd_cpu(file.fileno(), tensor.nbytes)  # type: ignore[attr-defined]
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())


def _open_memory_file() -> int | None:
    """Open an anonymous file in memory; None if the system lacks or forbids them."""
    try:
        return os.memfd_create("clip_retrieval")
    except AttributeError:
        return None
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EPERM, errno.EACCES):
            return None
        raise


def make_loading_error(error: OSError) -> RunError:
    """Return the error for loader processes that cannot start, or cannot send their results."""
    if error.errno == errno.EMFILE:
        return RunError("too many open files; raise the limit (ulimit -n 65536), or choose fewer --num_workers")
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        return RunError(f"loader processes could not be started ({error.strerror}); choose fewer --num_workers")
    try:
        free = f", {shutil.disk_usage(SHARED_MEMORY).free / 1e6:,.1f} MB free"
    except OSError:
        free = ""
    return RunError(
        f"{SHARED_MEMORY} is missing or too small for loader processes ({error.strerror}{free}); choose fewer "
        "--num_workers or --num_workers 0, or make it larger (docker run --shm-size 1g)"
    )
