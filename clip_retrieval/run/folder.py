"""The output folder of a run: create it, lock it, clear it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from clip_retrieval.errors import RunError, UserError
from clip_retrieval.files import remove_special
from clip_retrieval.log import log
from clip_retrieval.options import AUTO, Options, RunOptions
from clip_retrieval.reporting.results import delete_derived
from clip_retrieval.reporting.trackers import RUN_ID

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
LOCK_SECONDS = 1.0
"""How long a run waits for the lock."""
# File systems that cannot lock: NFS without its lock service, some FUSE mounts.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def run_folder(options: RunOptions) -> Path:
    """Return the output folder of a finetune."""
    return Path(options.checkpoint_path) / options.experiments


def results_folder(options: RunOptions, *names: str, model: str, beside: Path | None) -> Path:
    """Return the default folder of results with these names: `beside` a checkpoint, else for a model by its name."""
    if beside is None:
        names = (names[0], model, *names[1:])
    name = "_".join(re.sub(r"[^\w.@+-]+", "-", each) for each in names)
    return (Path(options.checkpoint_path) if beside is None else beside.parent) / name


def make_folder(folder: Path, options: str = "--checkpoint_path and --experiments") -> None:
    """Create `folder` and check that it is writable.

    Raises UserError, naming the `options` that choose another folder, if not.
    """
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        probe.unlink()
    except ValueError:
        raise UserError(f"{folder}: invalid folder name; choose another one with {options}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE):
            raise
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another place with {options}") from None


@dataclass
class FolderLock:
    """The lock of a run on its output folder. The system releases it if the run is killed.

    Attributes:
        folder: the output folder.
        descriptor: the open lock file; None if the file system cannot lock.
    """

    folder: Path
    descriptor: int | None

    def check(self) -> None:
        """Raise RunError if the folder was deleted, or replaced by the folder of another run."""
        exists = self.folder.is_dir() if self.descriptor is None else _is_file(self.descriptor, self.folder / LOCK)
        if not exists:
            raise self.deleted()

    def deleted(self) -> RunError:
        """Return the error for a deleted folder."""
        return RunError(f"{self.folder} was deleted during the run, together with its checkpoints; start the run again")


@contextlib.contextmanager
def lock_folder(folder: Path, options: str = "--checkpoint_path and --experiments") -> Iterator[FolderLock]:
    """Create `folder` and lock it for this run. Delete the temporary files of a run that was killed.

    The lock is a POSIX record lock: loader workers do not inherit it, and it works over NFS. Raises UserError, naming
    the `options` that choose another folder, if another run holds the lock.
    """
    is_new = not folder.exists()
    make_folder(folder, options)
    descriptor = _lock(folder, options)
    try:
        for half_written in folder.glob(".*.tmp"):
            half_written.unlink(missing_ok=True)
        yield FolderLock(folder, descriptor)
    finally:
        if descriptor is not None:
            if _is_file(descriptor, folder / LOCK):
                with contextlib.suppress(OSError):
                    (folder / LOCK).unlink()
            os.close(descriptor)
        if is_new:  # a run that did not start leaves nothing
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _lock(folder: Path, options: str) -> int | None:
    if fcntl is None:
        return None
    path = folder / LOCK
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        remove_special(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                log.warning(f"{folder} is on a file system without locks: start only one run at a time in it")
                return None
            if time.monotonic() < deadline:  # a process that was just killed may not have released it yet
                time.sleep(0.05)
                continue
            raise UserError(
                f"{folder} is in use by another run ({holder}); wait for it to end, or choose another folder with "
                f"{options}"
            ) from None
        # The previous holder may have deleted the file between open and lock: try again.
        if _is_file(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether `path` is still the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False


def refuse_another_run(folder: Path, options: RunOptions, pretrained: str | None, *, can_resume: bool) -> None:
    """Raise UserError if `folder` holds a run that is neither resumed nor overwritten.

    Also raises UserError if --overwrite would delete the initial weights of the new run.

    Args:
        folder: the output folder.
        options: those of the run.
        pretrained: the value of --pretrained, which may be a file in the folder.
        can_resume: --resume is a checkpoint from which a run can resume.
    """
    if not (folder / "last.pt").exists():
        return
    sources = {"--resume": options.resume, "--pretrained": pretrained}
    for name, source in sources.items():
        if options.overwrite and source and Path(source).resolve().parent == folder.resolve():
            raise UserError(f"--overwrite would delete {source} ({name}); drop it, or choose another --experiments")
    if not (can_resume and resumes_in(folder, options.resume)) and not options.overwrite:
        raise UserError(
            f"{folder} already holds a run; resume it (--resume auto), replace it (--overwrite), or choose "
            "another --experiments"
        )


def resumes_in(folder: Path, resume: str | None) -> bool:
    """Whether --resume is a file in `folder`."""
    return resume is not None and resume != AUTO and Path(resume).resolve().parent == folder.resolve()


def without_resume(options: Options, folder: Path) -> Options:
    """Return the options without --resume if that resumes in `folder`: a resumed run records the same options."""
    if options.run.resume != AUTO and not resumes_in(folder, options.run.resume):
        return options
    return replace(options, run=replace(options.run, resume=None))


def clear_run(folder: Path) -> None:
    """Delete the files of a run, and no others."""
    files = [
        "last.pt",
        "best.pt",
        "start.pt",
        "ema.pt",
        "swa.pt",
        "metrics.jsonl",
        "results.json",
    ]
    files += ["log.txt", RUN_ID]
    for path in [*(folder / name for name in files), *folder.glob("epoch_*.pt"), *folder.glob("step_*.pt")]:
        path.unlink(missing_ok=True)
    delete_derived(folder)
    remove_special(folder / "tensorboard", keep_folder=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
