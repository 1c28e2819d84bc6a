"""Which process of a run works on which batch: the protocol of such a queue, and one in SQLite. It is worth nothing
after the run and therefore never synced.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from datasetdm_fast.disk import sqlite

DIED, NOT_FINITE = "died", "not finite"  # reasons of a failure
_SCHEMA = """
CREATE TABLE session (last INTEGER NOT NULL);
CREATE TABLE queue (
    place INTEGER PRIMARY KEY, batch INTEGER NOT NULL UNIQUE, owner TEXT, helper TEXT,
    state TEXT NOT NULL CHECK (state IN ('free', 'taken', 'done'))
);
CREATE INDEX unfinished ON queue (state, place) WHERE state != 'done';
CREATE TABLE failures (batch INTEGER NOT NULL, slot INTEGER NOT NULL, reason TEXT NOT NULL);
CREATE INDEX failed ON failures (batch);
CREATE TABLE slots (slot INTEGER PRIMARY KEY);
CREATE TABLE owners (
    name TEXT PRIMARY KEY, slot INTEGER NOT NULL, host TEXT NOT NULL, process INTEGER NOT NULL, born TEXT NOT NULL,
    beats INTEGER NOT NULL
);
"""
# A batch may go to a slot that has not failed it, and to any once every slot has.
_TAKEABLE = """
SELECT place, batch FROM queue
WHERE state = 'free' AND (SELECT count(*) FROM failures f WHERE f.batch = queue.batch) {} 0 AND (
    NOT EXISTS (SELECT 1 FROM failures f WHERE f.batch = queue.batch AND f.slot = ?)
    OR NOT EXISTS (
        SELECT 1 FROM slots s
        WHERE NOT EXISTS (SELECT 1 FROM failures f WHERE f.batch = queue.batch AND f.slot = s.slot)
    )
) ORDER BY place LIMIT 1
"""
_HELD = "state = 'taken' AND owner != ? AND helper IS NULL"
_FREE = "UPDATE queue SET state = 'free', owner = NULL, helper = NULL WHERE state = 'taken' AND "


@dataclass(frozen=True)
class Owner:
    """A process that takes batches; a slot is a device, or a place beside others, and outlives its processes."""

    name: str
    slot: int
    host: str = ""
    process: int = 0
    born: str = ""  # when the process began, as its host counts


class WorkQueue(Protocol):
    """What a worker, and whoever watches it, asks of the queue of a run."""

    def enter(self, owner: Owner) -> None:
        """Adds a process, which has given no sign of life yet."""

    def leave(self, owner: Owner, reason: str | None = None) -> int:
        """Removes a process and frees its batches, each of them failed where there is a reason; how many these were."""

    def owners(self) -> dict[Owner, int]:
        """The processes at work, with the signs of life each has given."""

    def beat(self, owner: str) -> None:
        """A sign of life, to be given only where work has gone on."""

    def slots(self) -> set[int]:
        """The places from which processes come, whether they are there yet or not."""

    def give_up(self, slot: int) -> None:
        """No process is expected from this place any more."""

    def take(self, owner: Owner, *, is_fresh: bool = True) -> int | None:
        """The next batch, now this owner's: one that has not failed yet, or else one that has."""

    def held(self, owner: Owner) -> list[tuple[int, str]]:
        """The batches that one other process makes, with its name, that of the earliest place first."""

    def help(self, batch: int, owner: Owner) -> bool:
        """Whether the batch of another is now made by this owner too; not where it has a helper already."""

    def finish(self, batch: int) -> bool:
        """Whether this is the first to report the batch as committed."""

    def give_back(self, batch: int, owner: Owner, reason: str) -> None:
        """Frees a batch that has failed, first for other slots."""

    def failures(self, batch: int, reason: str) -> list[int]:
        """The slots where the batch failed for this reason, one entry a failure."""

    def is_over(self) -> bool:
        """Whether nothing is left to be taken, now or later."""


class SqliteQueue:
    """The queue of a run in a file that its processes share, or in memory; its methods may be called from any
    thread.
    """

    def __init__(self, path: Path | None = None):
        if path is None:
            self._connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            self._connection.executescript(_SCHEMA)
        else:
            self._connection = sqlite.connect(path, _SCHEMA, sqlite.IN_PLACE, "PRAGMA synchronous=OFF")
        self._lock = threading.RLock()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process changes the queue, or is in such a block of its own, within this one."""
        with self._lock:
            self.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self.execute("ROLLBACK")
                raise
            self.execute("COMMIT")

    def execute(self, statement: str, *values: object) -> list[tuple]:
        with self._lock:
            return self._connection.execute(statement, values).fetchall()

    def execute_many(self, statement: str, values: Sequence[tuple]) -> None:
        with self._lock:
            self._connection.executemany(statement, values)

    @property
    def last(self) -> int | None:
        """The last sample that is wanted; None before the queue is filled."""
        found = self.execute("SELECT last FROM session")
        return found[0][0] if found else None

    def fill(self, batches: Sequence[int], last: int) -> None:
        """Adds the batches, in this order; to be called within `alone`, and once."""
        self.execute("INSERT INTO session VALUES (?)", last)
        self.execute_many("INSERT INTO queue (batch, state) VALUES (?, 'free')", [(batch,) for batch in batches])

    def expect(self, slots: Iterable[int]) -> None:
        """Adds places from which processes will come."""
        self.execute_many("INSERT OR IGNORE INTO slots VALUES (?)", [(slot,) for slot in slots])

    def slots(self) -> set[int]:
        return {slot for (slot,) in self.execute("SELECT slot FROM slots")}

    def give_up(self, slot: int) -> None:
        self.execute("DELETE FROM slots WHERE slot = ?", slot)

    def enter(self, owner: Owner) -> None:
        values = (owner.name, owner.slot, owner.host, owner.process, owner.born)
        self.execute("INSERT OR REPLACE INTO owners VALUES (?, ?, ?, ?, ?, 0)", *values)

    def leave(self, owner: Owner, reason: str | None = None) -> int:
        with self.alone():
            found = self.execute("SELECT batch FROM queue WHERE state = 'taken' AND owner = ?", owner.name)
            if reason:
                failed = [(batch, owner.slot, reason) for (batch,) in found]
                self.execute_many("INSERT INTO failures VALUES (?, ?, ?)", failed)
            self.execute(_FREE + "owner = ?", owner.name)
            self.execute("UPDATE queue SET helper = NULL WHERE helper = ?", owner.name)
            self.execute("DELETE FROM owners WHERE name = ?", owner.name)
            return len(found)

    def owners(self) -> dict[Owner, int]:
        found = self.execute("SELECT name, slot, host, process, born, beats FROM owners")
        return {Owner(*owner): beats for *owner, beats in found}

    def beat(self, owner: str) -> None:
        self.execute("UPDATE owners SET beats = beats + 1 WHERE name = ?", owner)

    def take(self, owner: Owner, *, is_fresh: bool = True) -> int | None:
        with self.alone():
            found = self.execute(_TAKEABLE.format("=" if is_fresh else ">"), owner.slot)
            if not found:
                return None
            ((place, batch),) = found
            taken = "UPDATE queue SET state = 'taken', owner = ?, helper = NULL WHERE place = ?"
            self.execute(taken, owner.name, place)
            return batch

    def held(self, owner: Owner) -> list[tuple[int, str]]:
        return self.execute(f"SELECT batch, owner FROM queue WHERE {_HELD} ORDER BY place", owner.name)

    def help(self, batch: int, owner: Owner) -> bool:
        with self.alone():
            is_free = (batch,) in self.execute(f"SELECT batch FROM queue WHERE {_HELD}", owner.name)
            if is_free:
                self.execute("UPDATE queue SET helper = ? WHERE batch = ?", owner.name, batch)
            return is_free

    def finish(self, batch: int) -> bool:
        with self.alone():
            is_first = bool(self.execute("SELECT 1 FROM queue WHERE batch = ? AND state != 'done'", batch))
            self.execute("UPDATE queue SET state = 'done', owner = NULL, helper = NULL WHERE batch = ?", batch)
            return is_first

    def give_back(self, batch: int, owner: Owner, reason: str) -> None:
        with self.alone():
            self.execute("INSERT INTO failures VALUES (?, ?, ?)", batch, owner.slot, reason)
            self.execute(_FREE + "batch = ?", batch)

    def failures(self, batch: int, reason: str) -> list[int]:
        found = self.execute("SELECT slot FROM failures WHERE batch = ? AND reason = ?", batch, reason)
        return [slot for (slot,) in found]

    def is_over(self) -> bool:
        return self.last is not None and not self.execute("SELECT 1 FROM queue WHERE state != 'done' LIMIT 1")

    def close(self) -> None:
        self._connection.close()
