"""Faults in the file operations of a run: operations are counted, and a chosen one kills the process or fails.

Call `install` in the process of the program, before the program starts. Counted operations are open (for writing),
write, flush, fsync, rename, remove and mkdir of files below one folder.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KILL, KILL_CHILDREN, WAIT = "kill", "kill children", "wait"
BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class Fault:
    """A fault at one operation.

    Attributes:
        at: number of the operation, from 0, among those that match `file` and `kind`.
        action: KILL, KILL_CHILDREN (the loaders), WAIT (a second), or the number of an error to raise.
        when: BEFORE or AFTER the operation; an error is raised instead of it.
        file: match only operations on this file, by its `group`.
        kind: match only operations of this kind.
        lasting: raise the error at all later operations too.
    """

    at: int
    action: str | int = KILL
    when: str = BEFORE
    file: str = ""
    kind: str = ""
    lasting: bool = False


class _Watch:
    """Counts operations, and writes each to `record` if it is given."""

    def __init__(self, folder: Path, fault: Fault | None, record: Path | None):
        self.folder = str(folder)
        self.fault = fault
        self.count = 0
        self.record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if record else None
        self.process = os.getpid()

    def __call__(self, kind: str, path: Any, operation: Callable[[], Any]) -> Any:
        name = self._name(path)
        if not name or os.getpid() != self.process:
            return operation()
        if self.record is not None:
            os.write(self.record, f"{kind}\t{name}\n".encode(errors="backslashreplace"))
        fault = self.fault
        if fault is None or fault.kind not in ("", kind) or fault.file not in ("", group(name)):
            return operation()
        number, self.count = self.count, self.count + 1
        met = number == fault.at or (fault.lasting and number > fault.at)
        if met and isinstance(fault.action, int):
            raise OSError(fault.action, os.strerror(fault.action), *self._error_names(kind, path))
        if met and fault.when == BEFORE:
            _act(fault.action)
        result = operation()
        if met and fault.when == AFTER:
            _act(fault.action)
        return result

    @staticmethod
    def _error_names(kind: str, path: Any) -> tuple[str, ...]:
        """The file name in an error of this kind: a write or an fsync has none."""
        return () if kind in ("write", "flush", "fsync") else (os.fspath(path),)

    def _name(self, path: Any) -> str:
        """The path within the watched folder; empty if it is outside."""
        try:
            if isinstance(path, int):
                path = Path(f"/proc/self/fd/{path}").readlink()
                if not path.is_absolute():  # a pipe, a socket
                    return ""
            path = str(Path(os.fsdecode(path)).absolute())
        except (OSError, TypeError, ValueError):
            return ""
        return path[len(self.folder) + 1 :] if path.startswith(self.folder + os.sep) or path == self.folder else ""


def group(path: str) -> str:
    """The name of a file, without the id of the process that writes it and the suffix of a half-written file."""
    last = path.rpartition("/")[2]
    if "tfevents" in last:
        return "tfevents"
    parts = [part for part in last.split(".") if part and not part.isdecimal() and part != "tmp"]
    return ".".join(parts[-2:]) if parts else last


def _act(action: str) -> None:
    if action == KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == KILL_CHILDREN:
        for child in children(os.getpid()):
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    else:
        time.sleep(1.0)


def children(process: int) -> list[int]:
    """The child processes of a process, without the helpers of multiprocessing."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return [child for child in found if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()]


class _File:
    """A file whose writes are watched."""

    def __init__(self, file: Any, path: Any, watch: _Watch):
        self._file, self._path, self._watch = file, path, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self._file)

    def write(self, content: Any) -> int:
        return self._watch("write", self._path, lambda: self._file.write(content))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        return self._watch("flush", self._path, self._file.flush)


def install(folder: Path, fault: Fault | None = None, record: Path | None = None) -> None:
    """Watch the operations of this process on the files below `folder`."""
    watch = _Watch(folder, fault, record)
    open_file, open_descriptor = io.open, os.open

    def watched_open(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+"):
            return open_file(file, mode, *arguments, **options)
        opened = watch("open", file, lambda: open_file(file, mode, *arguments, **options))
        path = file if not isinstance(file, int) else Path(f"/proc/self/fd/{file}").readlink()
        return _File(opened, path, watch) if watch._name(path) else opened

    def watched_descriptor(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return open_descriptor(path, flags, *arguments, **options)
        return watch("open", path, lambda: open_descriptor(path, flags, *arguments, **options))

    def watch_operation(name: str, kind: str, which: int = 0) -> Callable:
        operation = getattr(os, name)
        return lambda *arguments, **options: watch(kind, arguments[which], lambda: operation(*arguments, **options))

    # replace the functions of the standard library
    builtins.open = io.open = watched_open
    os.open = watched_descriptor
    for name, kind, which in (
        *(("replace", "rename", 1), ("rename", "rename", 1), ("unlink", "remove", 0), ("remove", "remove", 0)),
        *(("fsync", "fsync", 0), ("fdatasync", "fsync", 0), ("mkdir", "mkdir", 0), ("truncate", "write", 0)),
        *(("ftruncate", "write", 0), ("write", "write", 0)),
    ):
        setattr(os, name, watch_operation(name, kind, which))


def limit_files(size: int) -> None:
    """Limit the size of files that this process writes, in bytes: longer writes fail with EFBIG."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
