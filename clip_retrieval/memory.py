"""Memory limits, to refuse a file or model that is too large before allocating memory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# The limits of a container (cgroup v2 and v1): a number of bytes, or "max".
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
FALLBACK = 16 * 2**30  # bytes, on systems without a known limit


def memory_limit() -> int:
    """Maximum memory of this process in bytes: the lowest limit of machine, container and shell."""
    limits = [FALLBACK]
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(path.read_text()))
    with contextlib.suppress(ImportError):
        import resource

        limits += [limit for limit in resource.getrlimit(resource.RLIMIT_AS) if limit != resource.RLIM_INFINITY]
    return min(limits)


def free_memory() -> int:
    """Memory available to this process in bytes; `memory_limit` on systems without /proc/meminfo."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = sum(1024 * int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    except (OSError, ValueError, KeyError):
        return memory_limit()
    return min(free, memory_limit())
