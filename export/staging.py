"""Folders that are filled by one process while others wait, and hold whole files only."""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing

PART = ".part"


def print_line(line: str) -> None:
    """Prints a line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def fill_alone(folder: Path) -> Iterator[None]:
    """Within the block no other process fills `folder`; others wait, and the lock ends with its process."""
    handle = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print_line(f"waiting for another process that fills {folder}")
            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if handle is not None:
            os.close(handle)
        raise Missing(
            f"{folder}: cannot be written to ({error.strerror})",
            f"Choose another folder; {storage.CACHE_VARIABLE} names that of the cache.",
        ) from error
    try:
        for leftover in folder.glob(f".*{PART}"):  # of processes that were killed
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                storage.forget(leftover)
        yield
    finally:
        os.close(handle)


@contextmanager
def stage_files(folder: Path, last: str, earlier: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write into; its files are then moved to `folder`, `last` after the others, none on an error.

    Files of the names `earlier` that are not written anew are deleted then. Call it within `fill_alone(folder)`.
    """
    stage = folder / f".{os.getpid()}{PART}"
    try:
        stage.mkdir()
        yield stage
        names = sorted((path.name for path in stage.iterdir()), key=lambda name: (name == last, name))
        (folder / last).unlink(missing_ok=True)  # at no moment between old and new files it names a mixture
        for name in set(earlier).difference(names):
            with suppress(FileNotFoundError):
                (folder / name).unlink()
        for name in names:
            storage.move(stage / name, folder / name)
    except OSError as error:
        raise storage.refusal(error, folder) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
