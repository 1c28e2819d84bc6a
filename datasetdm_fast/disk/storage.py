"""Files that appear whole or not at all: written beside their place, synced, renamed; a full disk is refused; locks."""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from datasetdm_fast.cores import in_blocks
from datasetdm_fast.errors import Missing, Refused, nearest

_PROCESS = secrets.randbelow(10**9)  # a process of another machine or container may have this one's number
_TEMPORARY = re.compile(r"\.(.+)\.(\d+)\.part(-wal|-shm|-journal)?")
_FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk has no room left, or the user may take no more of it
FULL = "the disk is full"  # the cause of a refusal
TOO_LARGE = "the file may not grow any more (ulimit -f, or the limit of the disk)"
_HAS_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # FAT, network disks, mounted stores
_CANNOT_LINK = (errno.EXDEV, errno.EMLINK, errno.EACCES, *_HAS_NO_LINKS)
FILES_PER_SYNC = 64  # files written before the first of them is synced: the disk then joins their journal entries
FILE_MODE, FOLDER_MODE = (0o666, 0o777)  # less the umask, which decides whether a group works on a run
NUMBER = re.compile(r"\d+")
MOST_COMPARED = 2000  # names of a folder that one which is not there is compared with


def syscall(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """What the call returns; every access to the disk passes here under its name."""
    return call(*arguments)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What was written under one name."""

    sha256: str
    size: int  # bytes


class Publication(AbstractContextManager):
    """Files that are written piece by piece and exist under their names once the block ends; none where it fails."""

    def __init__(self, paths: Iterable[Path]):
        self._parts = {path: part_of(path) for path in paths}
        self._handles: dict[Path, int] = {}
        self.digests = {path: hashlib.sha256() for path in self._parts}
        self.sizes = dict.fromkeys(self._parts, 0)

    def __enter__(self) -> Self:
        try:
            for path, part in self._parts.items():
                if not path.parent.is_dir():
                    make_folder(path.parent)
                with refusing(path):
                    self._handles[path] = _open_part(part)
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def write(self, path: Path, chunks: Iterable[bytes]) -> None:
        """Adds to one of the files."""
        for chunk in chunks:
            self.digests[path].update(chunk)
            self.sizes[path] += len(chunk)
            with refusing(path):
                _write_all(self._handles[path], chunk)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with ExitStack() as undo:
            for part in self._parts.values():
                undo.callback(forget, part)
            for path, handle in self._handles.items():
                undo.enter_context(refusing(path))  # a network file system may report a failed write only here
                undo.callback(syscall, "close", os.close, handle)
            if kind is not None:
                return
            for path, handle in self._handles.items():
                with refusing(path):
                    syscall("fsync", os.fsync, handle)
            for path, part in self._parts.items():
                with refusing(path):
                    syscall("rename", os.replace, part, path)
            for folder in sorted({path.parent for path in self._parts}):
                with refusing(folder):
                    sync(folder)


def publish(files: Mapping[Path, bytes | Iterable[bytes]]) -> dict[Path, StoredFile]:
    """Digest and size of every file, once all are on the disk under their names; none is ever half-written."""
    stored: dict[Path, StoredFile] = {}
    for block in map(dict, in_blocks(files.items(), FILES_PER_SYNC)):
        with Publication(block) as publication:
            for path, content in block.items():
                publication.write(path, [content] if isinstance(content, bytes) else content)
        for path, digest in publication.digests.items():
            stored[path] = StoredFile(digest.hexdigest(), publication.sizes[path])
    return stored


def create(path: Path, content: bytes) -> bool:
    """Whether this call made the file; False where one of that name was there first."""
    part = part_of(path)
    if not path.parent.is_dir():
        make_folder(path.parent)
    try:
        handle = _open_part(part)
        try:
            _write_all(handle, content)
            syscall("fsync", os.fsync, handle)
        finally:
            os.close(handle)
        try:
            syscall("link", os.link, part, path)
        except FileExistsError:  # also where NFS has lost the answer of the call that made it, see open(2)
            if part.stat().st_nlink < 2:
                return False
        except OSError as error:
            if error.errno not in _HAS_NO_LINKS:
                raise
            raise Missing(
                f"{path}: its file system has no hard links, by which processes share a run ({error.strerror})",
                "Choose a folder on another one, or make a run folder in one process (--layout folder).",
            ) from error
        sync(path.parent)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise refusal(error, path) from error
    finally:
        forget(part)
    return True


def part_of(path: Path) -> Path:
    """Where this process writes a file before it gets its name: no other process has that place, on any machine."""
    return path.with_name(f".{path.name}.{os.getpid()}{_PROCESS:09}.part")


def _open_part(part: Path) -> int:
    return syscall("open", os.open, part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)


@contextmanager
def empty_part(path: Path) -> Iterator[Path]:
    """An empty file beside its place, for libraries that would give a new one permissions of their own; it is removed
    where the block fails.
    """
    part = part_of(path)
    try:
        with refusing(path):
            os.close(_open_part(part))
        yield part
    except BaseException:
        forget(part)
        raise


def _write_all(handle: int, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        count = syscall("write", os.write, handle, rest)
        if not count:
            raise OSError(errno.EIO, "the disk took no byte")
        rest = rest[count:]


def link(source: Path, path: Path) -> bool:
    """Whether a file has this second name now: other disks, and some file systems, cannot give it one, and a symbolic
    link leads nowhere from another folder.
    """
    if source.is_symlink():
        return False
    part = part_of(path)
    if not path.parent.is_dir():
        make_folder(path.parent)
    try:
        forget(part)
        syscall("link", os.link, source, part)
        syscall("rename", os.replace, part, path)
    except OSError as error:
        if error.errno in _CANNOT_LINK:
            return False
        raise refusal(error, path) from error
    finally:
        forget(part)  # a rename onto another name of the same file leaves it
    return True


def move(part: Path, path: Path) -> None:
    """Gives a file that was written beside its place, by whomever, its name for good."""
    with refusing(path):
        sync(part)
        syscall("rename", os.replace, part, path)
        sync(path.parent)


def forget(part: Path) -> None:
    """Removes what a failed write left; what even that cannot remove is removed by the next start."""
    with suppress(OSError):
        syscall("unlink", os.unlink, part)


def refusal(error: OSError, path: str | Path) -> Missing:
    """The error of a command for an error of the disk."""
    if error.errno in _FULL:
        return Missing(f"{path}: {FULL}", "Free some space and run the same command again: it resumes.")
    if error.errno == errno.EFBIG:
        return Missing(f"{path}: {TOO_LARGE}", "Raise the limit and run the same command again: it resumes.")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return Missing(f"{path}: {error.strerror}", "Raise the limit (ulimit -n) and run the same command again.")
    alike = named_alike(Path(path)) if error.errno == errno.ENOENT else ""
    return Missing(
        f"{path}: {error.strerror or error}{alike}",
        "Check the folder and its permissions, then run the same command again.",
    )


def named_alike(path: Path) -> str:
    """' (did you mean X?)' where a name beside that of a file or folder which is not there is close to it and has no
    other numbers in it, as these are of another image; only a folder is alike to a folder above it. Of a symbolic
    link that leads nowhere, that it is one; of a name that only looks like the one that is there, why.
    """
    missing = path
    while path.parent != path and not path.parent.exists():
        path = path.parent
    if path.is_symlink():
        return f" ({'it' if path == missing else path} is a symbolic link that leads nowhere)"
    try:
        names = [name for name in os.listdir(path.parent) if name != path.name]
    except (OSError, ValueError):
        return ""
    if len(names) > MOST_COMPARED:
        return ""
    if unicodedata.normalize("NFC", path.name) in (unicodedata.normalize("NFC", name) for name in names):
        return " (its name there has its accents in another Unicode form, NFC or NFD: rename it)"
    numbers = NUMBER.findall(path.name)
    if path != missing:
        names = [name for name in names if os.path.isdir(path.parent / name)]
    return nearest(path.name, [name for name in names if NUMBER.findall(name) in (numbers, [])])


@contextmanager
def refusing(path: str | Path) -> Iterator[None]:
    """Within the block, an error of the disk becomes a refusal about this path."""
    try:
        yield
    except OSError as error:
        raise refusal(error, path) from error


def sync(path: Path) -> None:
    """Makes a file durable, or a folder: a rename is only durable once the folder that holds the name is."""
    handle = syscall("open", os.open, path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscall("fsync", os.fsync, handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some network file systems sync no folders
            raise
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """The folder and those above it, durable."""
    missing = [folder, *folder.parents]
    missing = missing[: next((k for k, path in enumerate(missing) if path.is_dir()), len(missing))]
    with refusing(folder):
        syscall("mkdir", os.makedirs, folder, FOLDER_MODE, True)
        for made in reversed(missing):
            sync(made.parent)


def read(path: Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes; a device or a pipe would never end, so they are refused."""
    with refusing(path):
        return _read(path, most)


def read_if_there(path: Path, most: int) -> bytes | None:
    """The bytes as of `read`, None without such a file; between two looks others might write or remove it."""
    with refusing(path), suppress(FileNotFoundError, NotADirectoryError):
        return _read(path, most)
    return None


def _read(path: Path, most: int) -> bytes:
    try:
        handle = syscall("open", os.open, path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:  # a NUL byte
        raise Refused(f"{str(path)!r}: cannot be read, no file has such a name", "Name a file.") from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise Refused(f"{path}: cannot be read, it is not a regular file", "Name a file.")
        if status.st_size > most:
            remedy = "Name the right file, or a smaller one."
            raise Refused(f"{path}: {status.st_size} bytes, at most {most} are read", remedy)
        parts = []
        while block := syscall("read", os.read, handle, 1 << 20):
            parts.append(block)
            most -= len(block)
            if most < 0:
                raise Refused(f"{path}: it grows while it is read", "Wait until it is complete.")
        return b"".join(parts)
    finally:
        os.close(handle)


def read_written(path: Path, written: StoredFile, most: int) -> bytes | None:
    """The bytes of a file if they are those that were written, else None."""
    content = read_if_there(path, most)
    if content is None or len(content) != written.size or hashlib.sha256(content).hexdigest() != written.sha256:
        return None
    return content


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, empty where there is no such file."""
    with refusing(path):
        try:
            if path.exists() and not path.is_file():  # the opening of a pipe may never end
                return ""
            with syscall("open", open, path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return ""


def remove(path: Path) -> None:
    if path.exists():
        with refusing(path):
            syscall("unlink", os.unlink, path)


def is_temporary(path: Path) -> bool:
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_temporaries(folder: Path, apart: Path | None = None) -> int:
    """How many half-written files of killed processes were deleted, but for `apart`; call it holding the lock."""
    try:
        paths = (path for path in folder.rglob(".*.part*") if is_temporary(path))
        leftovers = [path for path in paths if apart not in path.parents]
        for path in leftovers:
            syscall("unlink", os.unlink, path)
    except OSError as error:
        raise refusal(error, error.filename or folder) from error
    return len(leftovers)


def remove_parts_of(paths: Iterable[Path]) -> None:
    """Deletes what killed processes had half-written of these files, and no other file: not what a process that is
    alive here writes at this moment.
    """
    names: dict[Path, set[str]] = {}
    for path in paths:
        names.setdefault(path.parent, set()).add(path.name)
    for folder, expected in names.items():
        with refusing(folder), suppress(FileNotFoundError):
            for name in os.listdir(folder):
                match = _TEMPORARY.fullmatch(name)
                if match is None or match[1] not in expected:
                    continue
                process = int(match[2][:-9] or 0)  # that writes it
                if process in (0, os.getpid()) or not is_alive(process):
                    with suppress(FileNotFoundError):
                        syscall("unlink", os.unlink, folder / name)


def is_alive(process: int) -> bool:
    """Whether this machine or container has a process of that number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def free_bytes(path: Path) -> int:
    """Free bytes where `path` is, or will be."""
    while not is_there(path):
        path = path.parent
    return shutil.disk_usage(path).free


def is_there(path: Path) -> bool:
    """Whether something of that name exists; a folder that may not be looked into is refused."""
    with refusing(path):
        return path.exists()


def check_given(path: Path, flag: str, remedy: str) -> None:
    """Refuses what a flag names where it is no file."""
    if not is_there(path):
        raise Refused(f"{flag} {path}: no such file{named_alike(path)}", remedy)
    if not path.is_file():
        raise Refused(f"{flag} {path}: not a file", remedy)


CACHE_VARIABLE = "DATASETDM_CACHE"
SECONDS_BETWEEN_TRIES = 0.1
SECONDS_OF_A_LOOK = 0.3  # in which `is_locked` has surely let go of a lock


def cache_folder() -> Path:
    """$DATASETDM_CACHE, else datasetdm_fast in $XDG_CACHE_HOME or ~/.cache; refused where everyone may write, or where
    there can be none.
    """
    usual = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "datasetdm_fast")
    folder = Path(os.path.expanduser(os.environ.get(CACHE_VARIABLE) or usual))
    remedy = f"Name a folder of your own with {CACHE_VARIABLE}."
    if folder.parts[:1] == ("~",):
        raise Missing("no folder for the cache is known: HOME is not set, and this user has no home", remedy)
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        mode = folder.stat().st_mode
    except OSError as error:
        raise Missing(f"{folder}: there can be no cache ({error.strerror})", remedy) from error
    if mode & stat.S_IWOTH:
        raise Refused(f"{folder}: every user can write to this cache, so nothing in it can be trusted", remedy)
    return folder


@contextmanager
def hold_lock(path: Path, *, is_shared: bool = False, patience: float = SECONDS_OF_A_LOOK) -> Iterator[None]:
    """Holds a lock file, alone or shared, until the process ends; waits `patience` seconds for others."""
    kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
    end = time.monotonic() + patience
    with refusing(path):
        handle = syscall("open", os.open, path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
    try:
        while True:
            try:
                syscall("lock", fcntl.flock, handle, kind | fcntl.LOCK_NB)
                if not os.fstat(handle).st_nlink:  # whoever held it has removed it, with what it was for
                    raise BlockingIOError
                break
            except BlockingIOError as error:
                if time.monotonic() >= end:
                    raise Refused(
                        f"{path}: another process is writing to this run folder",
                        "Wait until it has ended, or choose another folder.",
                    ) from error
                time.sleep(SECONDS_BETWEEN_TRIES)
            except OSError as error:
                raise Missing(
                    f"{path}: the file system cannot lock files ({error.strerror})", "Use a folder on a local disk."
                ) from error
        yield
    finally:
        os.close(handle)


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
    with refusing(folder):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
