"""SQLite databases whose every error is a sentence with a remedy."""

import errno
import os
import resource
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
LOG = ("-wal", "-shm")  # endings of what SQLite keeps beside a database with a write-ahead log while it is open
READER_SECONDS = 5.0  # within which a process that reads its result closes the ledger
SECONDS_BETWEEN_TRIES = 0.05
LONGEST_ROW = 64 * 2**20  # bytes of a text in a ledger
RESTORE = "Restore the file from a copy, or choose another --out."


class Database:
    """A connection that threads may share; its errors are Refused for a bad file, Missing for a bad disk."""

    def __init__(self, path: Path, address: Path | str, *settings: str, is_uri: bool = False):
        if storage.is_there(path) and not path.is_file():  # SQLite would wait for a pipe for ever
            raise Refused(f"{path}: not a regular file", RESTORE)
        self.path, self._lock, self._process = path, threading.RLock(), os.getpid()
        self.version: tuple[int, int, int] | None = None  # of a file that was opened as immutable
        self._connection: sqlite3.Connection = self._run(
            "OPEN",
            lambda: sqlite3.connect(
                address, isolation_level=None, timeout=BUSY_SECONDS, check_same_thread=False, uri=is_uri
            ),
        )
        try:
            # A run folder may come from a stranger: nothing in its schema is run, and no text of it is endless.
            self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_ROW)
            for setting in ("PRAGMA trusted_schema=OFF", "PRAGMA cell_size_check=ON", *settings):
                self.execute(setting)
        except BaseException:
            self.close()
            raise

    def _run(self, statement: str, call: Callable[..., Any], *arguments: Any) -> Any:
        with self._lock:
            try:
                return storage.syscall(f"sqlite {statement.split(None, 1)[0]}", call, *arguments)
            except (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError):
                raise  # our own mistakes
            except (sqlite3.DatabaseError, OverflowError, UnicodeError) as error:
                raise _as_refusal(error, self.path) from error

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a statement."""
        return self._run(statement, lambda: self._connection.execute(statement, parameters).fetchall())

    def execute_many(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """Runs a statement once for each row of parameters."""
        self._run(statement, self._connection.executemany, statement, rows)

    def read_blocks(self, statement: str, parameters: Sequence[Any], size: int) -> Iterator[list[tuple[Any, ...]]]:
        """The rows of a statement in blocks, each read when it is requested."""
        cursor = self._run(statement, self._connection.execute, statement, parameters)
        while block := self._run(statement, cursor.fetchmany, size):
            yield block

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes of the block or none; no other process or thread changes the database within it."""
        with self._lock:
            self.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.execute("COMMIT")
            finally:
                if self._connection.in_transaction:  # a full disk has already rolled it back
                    with suppress(Missing):  # the first error is the one to report; closing rolls back as well
                        self.execute("ROLLBACK")

    def is_outdated(self) -> bool:
        """Whether a file that was opened as immutable has changed: what is read may then be old, or a mixture."""
        return self.version is not None and _version(self.path) != self.version

    def copy(self) -> Path:
        """A copy of the database beside its place, whose bytes depend on the rows alone; `move` puts it there."""
        with storage.empty_part(self.path) as part:
            self.execute("VACUUM INTO CAST(? AS TEXT)", (os.fsencode(part),))  # no name need be UTF-8
            # Its first page counts earlier copies, and says how the file is to be written to: the next to open it must
            # have nothing to change.
            Database(self.path, part, "PRAGMA schema_version=1", WRITE_AHEAD).close()
            # SQLite does not report that it could not change the journal's kind: the old one, which still exists, does.
            if part.with_name(f"{part.name}-journal").exists():
                raise storage.refusal(OSError(errno.EIO, os.strerror(errno.EIO)), self.path)
        return part

    def close(self) -> None:
        self._connection.close()

    def __del__(self) -> None:
        """Closes the file at once: Python's connection and its statements refer to each other."""
        if "_connection" in self.__dict__ and self._process == os.getpid():  # a fork leaves it to the first
            self.close()


def connect(path: Path, schema: str, journal: str = WRITE_AHEAD) -> Database:
    """A database for writing that survives a loss of power; it is created whole if missing."""
    if not path.exists():
        with storage.empty_part(path) as part:
            with closing(Database(path, part, "PRAGMA journal_mode=OFF", SYNCHRONOUS)) as database:
                database._run(schema, database._connection.executescript, schema)
            storage.move(part, path)
    return Database(path, path, journal, SYNCHRONOUS)


def connect_to_read(path: Path) -> Database:
    """A database for reading."""
    if path.with_name(path.name + "-journal").exists():
        # A loss of power in the middle of a change of the journal's kind: nobody can read before that change is taken
        # back, and readers cannot do so.
        with closing(Database(path, path)) as database:
            database.execute("SELECT count(*) FROM sqlite_master")
    version = _version(path)
    # Without a journal of either kind no process is writing, and `immutable` then lets a read-only medium be read.
    is_quiet = not any(path.with_name(path.name + kind).exists() for kind in ("-wal", "-journal"))
    address = f"{path.resolve().as_uri()}?mode=ro{'&immutable=1' * is_quiet}"
    database = Database(path, address, is_uri=True)
    if is_quiet:  # SQLite then takes no lock and caches what it has read, also where another process begins to write
        database.version = version
    return database


def has_log(path: Path) -> bool:
    """Whether there is something of a write-ahead log beside a database."""
    return any(path.with_name(path.name + kind).exists() for kind in LOG)


def remove_log(path: Path) -> None:
    """Removes the log beside a database that no process writes to: a reader that closes it last has to leave it."""
    end = time.monotonic() + READER_SECONDS
    while has_log(path) and time.monotonic() < end:
        Database(path, path, "SELECT count(*) FROM sqlite_master").close()
        time.sleep(SECONDS_BETWEEN_TRIES)


def _version(path: Path) -> tuple[int, int, int] | None:
    """Number, time of the last change and size of the file, by which a change is noticed; None where there is none.
    Some file systems tell times to two seconds.
    """
    with suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns, status.st_size
    return None


_DISK_ERRORS = [getattr(sqlite3, f"SQLITE_{name}") for name in "IOERR CANTOPEN READONLY NOMEM PERM".split()]


def _as_refusal(error: Exception, path: Path) -> Missing | Refused:
    """The refusal for an error of SQLite about this path."""
    call = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    code = call & 0xFF  # the rest of it says which call it was
    # the memory that processes share is a file beside the database, and a disk without room for it is full as well
    if code == sqlite3.SQLITE_FULL or call == sqlite3.SQLITE_IOERR_SHMSIZE:
        return storage.refusal(OSError(errno.ENOSPC, ""), path)
    if call == sqlite3.SQLITE_IOERR_WRITE and resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
        return storage.refusal(OSError(errno.EFBIG, ""), path)
    if code in _DISK_ERRORS:
        remedy = "Check the disk, the folder and its permissions, then run the same command again."
        return Missing(f"{path}: {error}", remedy)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        remedy = "Wait for that process and run the same command again."
        return Missing(f"{path}: another process has locked it ({error})", remedy)
    return Refused(f"{path}: not a readable ledger ({error})", RESTORE)
