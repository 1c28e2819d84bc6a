"""Locks between processes, and the folder for files that can be made again."""

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused

CACHE_VARIABLE = "DATASETDM_CACHE"
SECONDS_BETWEEN_TRIES = 0.1
SECONDS_OF_A_LOOK = 0.3  # in which `is_locked` has surely let go of a lock


def cache_folder() -> Path:
    """$DATASETDM_CACHE, else datasetdm_fast in $XDG_CACHE_HOME or ~/.cache; refused where everyone may write."""
    chosen = os.environ.get(CACHE_VARIABLE)
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "datasetdm_fast"
    folder = Path(chosen) if chosen else usual
    with suppress(OSError):  # whoever writes into it gets the error
        os.makedirs(folder, 0o700, exist_ok=True)
        if folder.stat().st_mode & stat.S_IWOTH:
            raise Refused(
                f"{folder}: every user can write to this cache, so nothing in it can be trusted",
                f"Name a folder of your own with {CACHE_VARIABLE}.",
            )
    return folder


@contextmanager
def hold_lock(path: Path, *, is_shared: bool = False, patience: float = SECONDS_OF_A_LOOK) -> Iterator[None]:
    """Holds a lock file, alone or shared, until the process ends; waits `patience` seconds for others."""
    kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
    end = time.monotonic() + patience
    with storage.refusing(path):
        handle = storage.syscall("open", os.open, path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, storage.FILE_MODE)
    try:
        while not _try_to_lock(handle, kind, path):
            if time.monotonic() >= end:
                raise Refused(
                    f"{path}: another process is writing to this run folder",
                    "Wait until it has ended, or choose another folder.",
                )
            time.sleep(SECONDS_BETWEEN_TRIES)
        yield
    finally:
        os.close(handle)


def _try_to_lock(handle: int, kind: int, path: Path) -> bool:
    try:
        storage.syscall("lock", fcntl.flock, handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise Missing(
            f"{path}: the file system cannot lock files ({error.strerror})", "Choose an --out on a local disk."
        ) from error
    return True


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock file."""
    try:
        with hold_lock(path, patience=0.0):
            return False
    except Refused:
        return True


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Waits until no other process is within this block for the folder, where its file system can lock folders."""
    with storage.refusing(folder):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
