"""SQLite databases whose every error is a sentence with a remedy."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused

SYNCHRONOUS = "PRAGMA synchronous=FULL"
WRITE_AHEAD = "PRAGMA journal_mode=WAL"
# for processes of several machines: a write-ahead log needs memory that all of them share
IN_PLACE = "PRAGMA journal_mode=PERSIST"
BUSY_SECONDS = 30.0  # a reader waits this long for a writer of the ledger, and the other way round
LONGEST_ROW = 64 * 2**20  # bytes of a text in a ledger


def connect(path: Path, schema: str, journal: str = WRITE_AHEAD, synchronous: str = "") -> Connection:
    """A database for writing, by one thread at a time, that survives a loss of power; made whole if missing."""
    if not path.exists():
        _create(path, schema)
    return _opened(path, path, journal, synchronous or SYNCHRONOUS, check_same_thread=False)


def _create(path: Path, schema: str) -> None:
    part = storage.part_of(path)
    try:
        with storage.refusing(path):
            storage.make_empty(part)
        with closing(_opened(path, part, "PRAGMA journal_mode=OFF", SYNCHRONOUS)) as connection:
            connection.executescript(schema)
        storage.move(part, path)
    except BaseException:
        storage.forget(part)
        raise


def compact(connection: Connection, path: Path) -> Path:
    """A copy of a database beside its place, whose bytes depend on the rows alone; `move` puts it there."""
    part = storage.part_of(path)
    try:
        with storage.refusing(path):
            storage.make_empty(part)
        connection.execute("VACUUM INTO CAST(? AS TEXT)", (os.fsencode(part),))  # no name need be UTF-8
        # Its first page counts earlier copies, and says how the file is to be written to: the next to open it must have
        # nothing to change.
        _opened(path, part, "PRAGMA schema_version=1", WRITE_AHEAD).close()
        # SQLite does not say that it could not change the journal's kind: the old one, which is still there, does.
        if part.with_name(f"{part.name}-journal").exists():
            raise storage.refusal(OSError(errno.EIO, os.strerror(errno.EIO)), path)
    except BaseException:
        storage.forget(part)
        raise
    return part


def connect_to_read(path: Path) -> Connection:
    """A database for reading, from any thread."""
    if path.with_name(path.name + "-journal").exists():
        # A loss of power in the middle of a change of the journal's kind: nobody can read before that change is taken
        # back, and readers cannot do so.
        with closing(_opened(path, path)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master")
    version = _version(path)
    # Without a journal of either kind nobody is writing, and `immutable` then lets a read-only medium be read.
    quiet = "" if any(path.with_name(path.name + kind).exists() for kind in ("-wal", "-journal")) else "&immutable=1"
    # No statement is kept: from Python 3.12 on, threads that run the same one at once end in an InterfaceError.
    options: dict[str, Any] = {"uri": True, "check_same_thread": False, "cached_statements": 0}
    connection = _opened(path, f"{path.resolve().as_uri()}?mode=ro{quiet}", **options)
    if quiet:  # SQLite then takes no lock and keeps what it has read, also where somebody begins to write
        connection.version = version
    return connection


def _version(path: Path) -> tuple[int, int] | None:
    """What a change of the file changes; None where there is no such file."""
    with suppress(OSError):
        found = path.stat()
        return found.st_mtime_ns, found.st_size
    return None


def _opened(path: Path, address: Path | str, *settings: str, **options: Any) -> Connection:
    if storage.is_there(path) and not path.is_file():  # SQLite would wait for a pipe for ever
        raise Refused(f"{path}: not a regular file", "Restore the file from a copy, or choose another --out.")
    with _refusing(path):
        connection: Connection = storage.syscall(
            "sqlite OPEN",
            lambda: sqlite3.connect(address, isolation_level=None, timeout=BUSY_SECONDS, factory=Connection, **options),
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
    """A connection whose errors are Refused for a bad file, Missing for a bad disk, else sqlite3's own."""

    path = Path()
    version: tuple[int, int] | None = None  # of a file that was opened as one that nobody changes

    def is_outdated(self) -> bool:
        """Whether such a file has changed since: what is read through this connection may then be old, or a mixture."""
        return self.version is not None and _version(self.path) != self.version

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
            return storage.syscall(f"sqlite {statement.split(None, 1)[0]}", call, statement, *arguments)

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

    def fetchmany(self, size: int) -> list[Any]:
        with _refusing(self.connection.path):
            return super().fetchmany(size)

    def __next__(self) -> Any:
        with _refusing(self.connection.path):
            return super().__next__()


_DISK = (
    *(sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY),
    *(sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PERM),
)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError):
        raise  # our own mistakes
    except (sqlite3.DatabaseError, OverflowError, UnicodeError) as error:
        call = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        code = call & 0xFF  # the rest of it says which call it was
        # the memory that processes share is a file beside the database, and a disk without room for it is full as well
        if code == sqlite3.SQLITE_FULL or call == sqlite3.SQLITE_IOERR_SHMSIZE:
            raise storage.refusal(OSError(errno.ENOSPC, ""), path) from error
        if code in _DISK:
            remedy = "Check the disk, the folder and its permissions, then run the same command again."
            raise Missing(f"{path}: {error}", remedy) from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            remedy = "Wait for that process and run the same command again."
            raise Missing(f"{path}: another process has locked it ({error})", remedy) from error
        remedy = "Restore the file from a copy, or choose another --out."
        raise Refused(f"{path}: not a readable ledger ({error})", remedy) from error
