"""The only way to the disk: bytes are written beside their place, synced and renamed, so a file is whole or absent.

Every call that reaches the disk goes through `through`, SQLite's statements too: a test puts a counter there and lets any one of them fail.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasetdm_fast.errors import Missing, Refused

_TEMPORARY = re.compile(r"\..+\.\d+\.part(-wal|-shm|-journal)?")
CACHE_VARIABLE = "DATASETDM_CACHE"
_FULL = (errno.ENOSPC, errno.EDQUOT)
TOGETHER = 64  # files written before the first of them is synced: the disk then joins their journal entries
SYNCHRONOUS = "PRAGMA synchronous=FULL"
WRITE_AHEAD = "PRAGMA journal_mode=WAL"
IN_PLACE = "PRAGMA journal_mode=PERSIST"  # for processes of several machines: a write-ahead log needs memory that all of them share
BUSY_SECONDS = 30.0  # a reader waits this long for a writer of the ledger, and the other way round
LONGEST_ROW = 64 * 2**20  # bytes of a text in a ledger


def _directly(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
    return call(*arguments)


through: Callable[..., Any] = _directly


@dataclass(frozen=True)
class Stored:
    """What was written under one name."""

    sha256: str
    size: int  # bytes


def publish(files: Mapping[Path, bytes | Iterable[bytes]]) -> dict[Path, Stored]:
    """Digest and size of every file, once all of them are on the disk under their own names; on an error none has a new name half-written."""
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    stored: dict[Path, Stored] = {}
    try:
        for folder in dict.fromkeys(path.parent for path in files):
            if not folder.is_dir():
                make_folder(folder)
        waiting = iter(files.items())
        while block := list(islice(waiting, TOGETHER)):
            stored |= _write({parts[path]: content for path, content in block}, [path for path, _ in block])
        for path, part in parts.items():
            through("rename", os.replace, part, path)
        for folder in sorted({path.parent for path in files}):
            sync_folder(folder)
    except BaseException as error:
        for part in parts.values():
            _forget(part)
        if isinstance(error, OSError):
            raise refusal(error, error.filename or next(iter(files), "the run folder")) from error
        raise
    return stored


def _write(contents: Mapping[Path, bytes | Iterable[bytes]], names: Iterable[Path]) -> dict[Path, Stored]:
    """Writes and syncs the parts; what they hold, by the names they are to have."""
    handles: list[int] = []
    found = {}
    try:
        for (part, content), name in zip(contents.items(), names, strict=True):
            handles.append(through("open", os.open, part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644))
            found[name] = _fill(handles[-1], [content] if isinstance(content, bytes) else content)
        for handle in handles:
            through("fsync", os.fsync, handle)
    finally:
        for handle in handles:
            os.close(handle)
    return found


def _fill(handle: int, chunks: Iterable[bytes]) -> Stored:
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
        rest = memoryview(chunk)
        while rest:
            count = through("write", os.write, handle, rest)
            if not count:
                raise OSError(errno.EIO, "the disk took no byte")
            rest = rest[count:]
    return Stored(digest.hexdigest(), size)


def move(part: Path, path: Path) -> None:
    """Gives a file that was written beside its place, by whomever, its name for good."""
    try:
        handle = through("open", os.open, part, os.O_RDONLY | os.O_CLOEXEC)
        try:
            through("fsync", os.fsync, handle)
        finally:
            os.close(handle)
        through("rename", os.replace, part, path)
        sync_folder(path.parent)
    except OSError as error:
        raise refusal(error, path) from error


def _forget(part: Path) -> None:
    """Removes what a failed write left; what even that cannot remove is removed by the next start."""
    try:
        through("unlink", os.unlink, part)
    except OSError:
        pass


def refusal(error: OSError, path: str | Path) -> Missing:
    """What a command says and does where the disk does not do its part."""
    if error.errno in _FULL:
        return Missing(f"{path}: the disk is full", "Make room and run the same line again: it goes on where it stopped.")
    return Missing(f"{path}: {error.strerror or error}", "Check the folder and its permissions, then run the same line again.")


def sync_folder(folder: Path) -> None:
    """A rename is only durable once the folder that holds the name is."""
    handle = through("open", os.open, folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        through("fsync", os.fsync, handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """The folder and those above it, durable."""
    missing = [folder, *folder.parents]
    missing = missing[: next((k for k, path in enumerate(missing) if path.is_dir()), len(missing))]
    try:
        through("mkdir", os.makedirs, folder, 0o755, True)
        for made in reversed(missing):
            sync_folder(made.parent)
    except OSError as error:
        raise refusal(error, folder) from error


def read(path: Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes; a device or a pipe would never end, so they are refused."""
    try:
        handle = through("open", os.open, path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise refusal(error, path) from error
    except ValueError as error:  # a NUL byte
        raise Refused(f"{str(path)!r}: cannot be read, no file has such a name", "Name a file.") from error
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise Refused(f"{path}: cannot be read, it is not a regular file", "Name a file.")
        if found.st_size > most:
            raise Refused(f"{path}: {found.st_size} bytes, at most {most} are read", "Name the right file, or a smaller one.")
        parts = []
        while block := through("read", os.read, handle, 1 << 20):
            parts.append(block)
            most -= len(block)
            if most < 0:
                raise Refused(f"{path}: it grows while it is read", "Wait until it is complete.")
        return b"".join(parts)
    except OSError as error:
        raise refusal(error, path) from error
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, empty where there is no such file."""
    try:
        with through("open", open, path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return ""
    except OSError as error:
        raise refusal(error, path) from error


def remove(path: Path) -> None:
    """Deletes a file, where there is one."""
    if not path.exists():
        return
    try:
        through("unlink", os.unlink, path)
    except OSError as error:
        raise refusal(error, path) from error


def is_temporary(path: Path) -> bool:
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_temporaries(folder: Path) -> int:
    """How many half-written files of earlier, killed processes were deleted; call it while holding the lock."""
    try:
        leftovers = [path for path in folder.rglob(".*.part*") if is_temporary(path)]
        for path in leftovers:
            through("unlink", os.unlink, path)
    except OSError as error:
        raise refusal(error, error.filename or folder) from error
    return len(leftovers)


def cache_folder() -> Path:
    """Where what can be made again is kept: $DATASETDM_CACHE, else datasetdm_fast in $XDG_CACHE_HOME or ~/.cache; refused where everyone may write."""
    kept = os.environ.get(CACHE_VARIABLE)
    folder = Path(kept) if kept else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "datasetdm_fast"
    with suppress(OSError):  # whoever writes into it is told why it cannot be made
        os.makedirs(folder, 0o700, exist_ok=True)
        if folder.stat().st_mode & stat.S_IWOTH:
            raise Refused(f"{folder}: everyone may write to this cache, so nothing in it can be trusted", f"Name a folder of your own with {CACHE_VARIABLE}.")
    return folder


def free_bytes(path: Path) -> int:
    """Free bytes where `path` is, or will be."""
    while not is_there(path):
        path = path.parent
    return shutil.disk_usage(path).free


def is_there(path: Path) -> bool:
    """Whether something of that name exists; a folder that may not be looked into is refused."""
    try:
        return path.exists()
    except OSError as error:
        raise refusal(error, path) from error


@contextmanager
def locked(path: Path, *, is_shared: bool = False) -> Iterator[None]:
    """Holds the lock file `path` for this process, alone or with others that share it; the operating system lets go of it however the process ends."""
    try:
        handle = through("open", os.open, path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise refusal(error, path) from error
    try:
        try:
            through("lock", fcntl.flock, handle, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(f"{path}: another process is writing to this run folder", "Wait for it, or choose another --out.") from error
        except OSError as error:
            raise Missing(f"{path}: the file system cannot lock files ({error.strerror})", "Choose an --out on a local disk.") from error
        yield
    finally:
        os.close(handle)


# SQLite -----------------------------------------------------------------------------------------------------------------------------


def connect(path: Path, schema: str, journal: str = WRITE_AHEAD, synchronous: str = "") -> Connection:
    """A database for writing, by one thread at a time, whose commits survive a loss of power; what goes wrong in it later is refused by name.

    Where there is none it is made beside its place, so that one that is there has its tables.
    """
    if not path.exists():
        _create(path, schema)
    return _opened(path, path, journal, synchronous or SYNCHRONOUS, check_same_thread=False)


def _create(path: Path, schema: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _forget(part)
        with closing(_opened(path, part, "PRAGMA journal_mode=OFF", SYNCHRONOUS)) as connection:
            connection.executescript(schema)
        move(part, path)
    except BaseException:
        _forget(part)
        raise


def compact(connection: Connection, path: Path) -> Path:
    """A copy of a database beside its place, whose bytes depend on the rows alone and not on how they came in; `move` puts it there."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _forget(part)
        connection.execute("VACUUM INTO ?", (str(part),))
        # Its first page counts earlier copies, and says how the file is to be written to: the next to open it must have nothing to change.
        _opened(path, part, "PRAGMA schema_version=1", WRITE_AHEAD).close()
        # SQLite does not say that it could not change the journal's kind: the old one, which is still there, does.
        if part.with_name(f"{part.name}-journal").exists():
            raise refusal(OSError(errno.EIO, os.strerror(errno.EIO)), path)
    except BaseException:
        _forget(part)
        raise
    return part


def connect_to_read(path: Path) -> Connection:
    """A database for reading, from any thread."""
    if path.with_name(path.name + "-journal").exists():
        # A loss of power in the middle of a change of the journal's kind: nobody can read before that change is taken back, and readers cannot do so.
        with closing(_opened(path, path)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master")
    # Without a journal of either kind nobody is writing, and `immutable` then lets a read-only medium be read.
    quiet = "" if any(path.with_name(path.name + kind).exists() for kind in ("-wal", "-journal")) else "&immutable=1"
    return _opened(path, f"{path.resolve().as_uri()}?mode=ro{quiet}", uri=True, check_same_thread=False)


def _opened(path: Path, address: Path | str, *settings: str, **options: Any) -> Connection:
    with _refusing(path):
        connection: Connection = through(
            "sqlite OPEN", lambda: sqlite3.connect(address, isolation_level=None, timeout=BUSY_SECONDS, factory=Connection, **options)
        )
    try:
        connection.prepare(path)
        for setting in settings:
            connection.execute(setting)
    except BaseException:
        connection.close()
        raise
    return connection


class Connection(sqlite3.Connection):
    """A connection whose errors are Refused where the file is no good, Missing where the disk is not, and sqlite3's own for the rest."""

    path = Path()

    def prepare(self, path: Path) -> None:
        self.path = path
        # A run folder may come from a stranger: nothing in its schema is run, and no text of it is endless.
        self.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_ROW)
        self.execute("PRAGMA trusted_schema=OFF")
        self.execute("PRAGMA cell_size_check=ON")

    # sqlite3 itself would take the short way past our cursor.
    def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
        return self.cursor(_Cursor).execute(statement, *arguments)

    def executemany(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
        return self.cursor(_Cursor).executemany(statement, *arguments)

    def executescript(self, script: str) -> sqlite3.Cursor:
        return self.cursor(_Cursor).executescript(script)


class _Cursor(sqlite3.Cursor):
    def _say(self, call: Callable[..., Any], statement: str, *arguments: Any) -> Any:
        with _refusing(self.connection.path):
            return through(f"sqlite {statement.split(None, 1)[0]}", call, statement, *arguments)

    def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
        return self._say(super().execute, statement, *arguments)

    def executemany(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
        return self._say(super().executemany, statement, *arguments)

    def executescript(self, script: str) -> sqlite3.Cursor:
        return self._say(super().executescript, script)

    def fetchone(self) -> Any:
        with _refusing(self.connection.path):
            return super().fetchone()

    def fetchall(self) -> list[Any]:
        with _refusing(self.connection.path):
            return super().fetchall()

    def __next__(self) -> Any:
        with _refusing(self.connection.path):
            return super().__next__()


_DISK = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PERM)
_OTHERS = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError):
        raise  # our own mistakes
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # the rest of it says which call it was
        if code == sqlite3.SQLITE_FULL:
            raise Missing(f"{path}: the disk is full", "Make room and run the same line again: it goes on where it stopped.") from error
        if code in _DISK:
            raise Missing(f"{path}: {error}", "Check the disk, the folder and its permissions, then run the same line again.") from error
        if code in _OTHERS:
            raise Missing(f"{path}: another process holds it ({error})", "Wait for that process and run the same line again.") from error
        raise Refused(f"{path}: not a readable ledger ({error})", "Restore the file from a copy, or choose another --out.") from error
    except (OverflowError, UnicodeError) as error:
        raise Refused(f"{path}: not a readable ledger ({error})", "Restore the file from a copy, or choose another --out.") from error
