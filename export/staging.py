"""Folders that are filled by one process while others wait, and hold whole files only."""

import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from datasetdm_fast.disk.locks import CACHE_VARIABLE
from datasetdm_fast.disk.storage import sync_folder
from datasetdm_fast.errors import Missing

PART = ".part"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def take_lock(handle: int, waits: Callable[[], None]) -> None:
    """Locks an open file for this process, waiting for whoever has it; `waits` is called once if it must wait."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waits()
        fcntl.flock(handle, fcntl.LOCK_EX)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within the block no other process fills `folder`; others wait, and the lock ends with its process."""
    handle = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        take_lock(handle, lambda: say(f"waiting for another process that fills {folder}"))
    except OSError as error:
        if handle is not None:
            os.close(handle)
        raise Missing(
            f"{folder}: cannot be written to ({error.strerror})",
            f"Choose another folder; {CACHE_VARIABLE} names that of the cache.",
        ) from error
    try:
        for leftover in folder.glob(f".*{PART}"):  # of processes that were killed
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        os.close(handle)


@contextmanager
def staged(folder: Path, last: str, earlier: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write into; its files are then moved to `folder`, `last` after the others, none on an error.

    Files of the names `earlier` that are not written anew are deleted then. Call it within `alone(folder)`.
    """
    stage = folder / f".{os.getpid()}{PART}"
    try:
        stage.mkdir()
        yield stage
        names = sorted(path.name for path in stage.iterdir())
        for name in names:
            _sync(stage / name)
        (folder / last).unlink(missing_ok=True)  # at no moment between old and new files it names a mixture
        for name in set(earlier).difference(names):
            (folder / name).unlink(missing_ok=True)
        for name in sorted(names, key=lambda name: name == last):
            os.replace(stage / name, folder / name)
        sync_folder(folder)
    except OSError as error:
        raise Missing(
            f"{folder}: {error.strerror or error}",
            "Free some space or choose another folder, then run the same command again.",
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
