"""Files that a crash cannot tear, locks that die with their holder, and free space.

Everything is written under a temporary name beside its place, synced, then renamed: a
reader, or whoever comes after a kill, sees the old or the new, whole.
"""

import contextlib
import errno
import fcntl
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from trinity_lib.config import Refusal

LOCK_PATIENCE = 0.3
"""Seconds to wait for a lock: a reader's look at it takes microseconds."""


class NoSpace(Refusal, OSError):
    """The disk is full, or too small for what is about to be written."""


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write one file whole or not at all; `write` is given the temporary path."""
    temporary = beside(path)
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """The same for a folder; an older one of the name is replaced."""
    temporary = beside(folder)
    new_folder(temporary)
    try:
        write(temporary)
        put(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def new_folder(folder: Path) -> None:
    """An empty folder, whatever was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def put(temporary: Path, folder: Path) -> None:
    """Bring a folder's files to the disk and give it its name, which an older one loses."""
    old = beside(folder).with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    for inner in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
        sync_folder(inner)
    if folder.exists():
        folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder; a kill in between leaves nothing of its name."""
    doomed = beside(folder)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def tidy(folder: Path) -> None:
    """Remove what killed writers left half written; only for who holds the folder's lock."""
    for path in [*folder.glob(".*"), *folder.glob("*/.*")]:
        if path.suffix == ".old" and not (whole := path.with_name(path.stem[1:])).exists():
            path.rename(whole)  # killed between the two renames of `replace_folder`
        elif path.suffix == ".old" or path.suffix[1:].isdigit():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_dead(folder: Path) -> None:
    """Remove what processes of this machine that are gone left of `folder`."""
    here = f"{folder.name}.{platform.node()}."
    for leftover in folder.parent.glob(f"{folder.name}.*"):
        pid = leftover.name.removeprefix(here).partition(".")[0]
        if leftover.name.startswith(here) and pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def of_this_process(folder: Path) -> Path:
    """A name beside `folder` that no other process has, nor this one had."""
    return folder.with_name(f"{folder.name}.{platform.node()}.{os.getpid()}.{time.time_ns()}")


def sync_folder(folder: Path) -> None:
    """Bring a flat folder's files to the disk."""
    for path in (*folder.iterdir(), folder):
        _sync(path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def lock(path: Path) -> IO[bytes] | None:
    """An exclusive lock that ends with this process, or None where another holds it."""
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have removed the file between our opening and locking it.
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                return None
            time.sleep(0.02)
        file.close()


def locked(path: Path) -> bool:
    """Whether a living process holds the lock."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise NoSpace where the disk of `folder` has fewer free bytes than `needed`."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise NoSpace(
            f"{folder} has {_megabytes(free)} free; {what} need {_megabytes(needed)}: free "
            "some space or put the runs on another disk."
        )


def is_full(error: BaseException) -> bool:
    """Whether an exception says that a disk, a quota or a file-size limit is used up."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = ("No space left", "Disk quota exceeded", "File too large")
    return getattr(error, "errno", None) in full or any(word in str(error) for word in words)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def beside(path: Path) -> Path:
    """A hidden name of this process for what will be `path`; `tidy` removes it."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def _sync(path: Path) -> None:
    with _descriptor(path) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
