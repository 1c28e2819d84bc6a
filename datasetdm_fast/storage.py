"""The only way to the disk: bytes are written beside their place, synced and renamed, so a file is whole or absent."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.errors import Missing, Refused

_TEMPORARY = re.compile(r"\..+\.\d+\.part")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Stored:
    """What was written under one name."""

    sha256: str
    size: int  # bytes


def publish(files: Mapping[Path, bytes | Iterable[bytes]]) -> dict[Path, Stored]:
    """Digest and size of every file, once all of them are on the disk under their own names; on an error none has a new name half-written."""
    staged: dict[Path, tuple[Path, Stored]] = {}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}.part")
            staged[path] = (part, Stored("", 0))
            staged[path] = (part, _write(part, [content] if isinstance(content, bytes) else content))
        for path, (part, _) in staged.items():
            os.replace(part, path)
        for folder in sorted({path.parent for path in staged}):
            sync_folder(folder)
    except OSError as error:
        for part, _ in staged.values():
            part.unlink(missing_ok=True)
        raise _refusal(error, error.filename or "the run folder") from error
    except BaseException:
        for part, _ in staged.values():
            part.unlink(missing_ok=True)
        raise
    return {path: stored for path, (_, stored) in staged.items()}


def _write(part: Path, chunks: Iterable[bytes]) -> Stored:
    digest, size = hashlib.sha256(), 0
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    return Stored(digest.hexdigest(), size)


def _refusal(error: OSError, path: str | Path) -> Missing:
    if error.errno in _FULL:
        return Missing(f"{path}: the disk is full", "Make room and run the same line again: it goes on where it stopped.")
    return Missing(f"{path}: {error.strerror or error}", "Check the folder and its permissions, then run the same line again.")


def sync_folder(folder: Path) -> None:
    """A rename is only durable once the folder that holds the name is."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
    except OSError as error:
        raise _refusal(error, folder) from error


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, empty where there is no such file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_temporary(path: Path) -> bool:
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_temporaries(folder: Path) -> int:
    """How many half-written files of earlier, killed processes were deleted; call it while holding the lock."""
    leftovers = [path for path in folder.rglob(".*.part") if is_temporary(path)]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def free_bytes(path: Path) -> int:
    """Free bytes where `path` is, or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file `path` for this process; the operating system lets go of it when the process ends, however it ends."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _refusal(error, path) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(f"{path}: another process is writing to this run folder", "Wait for it, or choose another --out.") from error
        except OSError as error:
            raise Missing(f"{path}: the file system cannot lock files ({error.strerror})", "Choose an --out on a local disk.") from error
        yield
    finally:
        os.close(handle)
