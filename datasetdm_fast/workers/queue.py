"""Which process of a run works on which batch: a queue in SQLite beside the ledger, worth nothing after the run and
therefore never synced.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.disk import sqlite

MOST_FAILURES = 3  # deaths of processes that one batch may be the reason of
_SCHEMA = """
CREATE TABLE session (last INTEGER NOT NULL);
CREATE TABLE queue (
    place INTEGER PRIMARY KEY, batch INTEGER NOT NULL UNIQUE, state TEXT NOT NULL CHECK (state IN ('free', 'taken', 'done')), owner TEXT, helper TEXT
);
CREATE INDEX unfinished ON queue (state, place) WHERE state != 'done';
CREATE TABLE failures (batch INTEGER NOT NULL, slot INTEGER NOT NULL, reason TEXT NOT NULL);
CREATE INDEX failed ON failures (batch);
CREATE TABLE slots (slot INTEGER PRIMARY KEY);
CREATE TABLE owners (name TEXT PRIMARY KEY, slot INTEGER NOT NULL, host TEXT NOT NULL, process INTEGER NOT NULL, born TEXT NOT NULL, beats INTEGER NOT NULL);
"""
# A batch may go to a slot that has not failed it, and to any once every slot has.
_TAKEABLE = """
SELECT place, batch FROM queue WHERE state = 'free' AND (SELECT count(*) FROM failures f WHERE f.batch = queue.batch) {} 0 AND (
    NOT EXISTS (SELECT 1 FROM failures f WHERE f.batch = queue.batch AND f.slot = ?)
    OR NOT EXISTS (SELECT 1 FROM slots s WHERE NOT EXISTS (SELECT 1 FROM failures f WHERE f.batch = queue.batch AND f.slot = s.slot))
) ORDER BY place LIMIT 1
"""
DIED, NOT_FINITE = "died", "not finite"


@dataclass(frozen=True)
class Owner:
    """A process that takes batches; a slot is a GPU, or a place beside others, and outlives the processes that fill
    it.
    """

    name: str
    slot: int
    host: str = ""
    process: int = 0
    born: str = ""  # when the process began, as its host counts


@dataclass(frozen=True)
class Held:
    """A batch somebody works on."""

    batch: int
    owner: str
    helper: str | None


class Leases:
    """The queue of a run, open; its methods may be called from any thread."""

    def __init__(self, path: Path):
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
        """The last sample that is wanted; None before the queue is laid."""
        found = self.execute("SELECT last FROM session")
        return found[0][0] if found else None

    def lay(self, batches: Sequence[int], last: int) -> None:
        """Lays the queue, in this order; to be called within `alone`, and once."""
        self.execute("INSERT INTO session VALUES (?)", last)
        self.execute_many("INSERT INTO queue (batch, state) VALUES (?, 'free')", [(batch,) for batch in batches])

    def expect(self, slots: Iterable[int]) -> None:
        """Adds places from which processes come, whether they are there yet or not."""
        self.execute_many("INSERT OR IGNORE INTO slots VALUES (?)", [(slot,) for slot in slots])

    def give_up(self, slot: int) -> None:
        """Nobody is expected from this place any more."""
        self.execute("DELETE FROM slots WHERE slot = ?", slot)

    def slots(self) -> set[int]:
        return {slot for (slot,) in self.execute("SELECT slot FROM slots")}

    def enter(self, owner: Owner) -> None:
        self.execute(
            "INSERT OR REPLACE INTO owners VALUES (?, ?, ?, ?, ?, 0)",
            owner.name,
            owner.slot,
            owner.host,
            owner.process,
            owner.born,
        )

    def beat(self, owner: str) -> None:
        """A sign of life, to be given only where work has gone on."""
        self.execute("UPDATE owners SET beats = beats + 1 WHERE name = ?", owner)

    def owners(self) -> dict[Owner, int]:
        """Who is at work, with the signs of life each has given."""
        return {
            Owner(*found): beats
            for *found, beats in self.execute("SELECT name, slot, host, process, born, beats FROM owners")
        }

    def take(self, owner: Owner, *, is_fresh: bool = True) -> int | None:
        """The next batch, now this owner's: one that nobody has failed yet, or else one that somebody has."""
        with self.alone():
            found = self.execute(_TAKEABLE.format("=" if is_fresh else ">"), owner.slot)
            if not found:
                return None
            ((place, batch),) = found
            self.execute(
                "UPDATE queue SET state = 'taken', owner = ?, helper = NULL WHERE place = ?", owner.name, place
            )
            return batch

    def held(self) -> list[Held]:
        """What is being worked on, the batch of the earliest place first."""
        return [
            Held(*found)
            for found in self.execute("SELECT batch, owner, helper FROM queue WHERE state = 'taken' ORDER BY place")
        ]

    def help(self, batch: int, owner: Owner) -> bool:
        """Whether the batch of another is free to be made twice; it is not where somebody helps already."""
        with self.alone():
            found = self.execute(
                "SELECT 1 FROM queue WHERE batch = ? AND state = 'taken' AND owner != ? AND helper IS NULL",
                batch,
                owner.name,
            )
            if found:
                self.execute("UPDATE queue SET helper = ? WHERE batch = ?", owner.name, batch)
            return bool(found)

    def finish(self, batch: int) -> bool:
        """Whether this is the first to report the batch as committed."""
        with self.alone():
            is_first = bool(self.execute("SELECT 1 FROM queue WHERE batch = ? AND state != 'done'", batch))
            self.execute("UPDATE queue SET state = 'done', owner = NULL, helper = NULL WHERE batch = ?", batch)
            return is_first

    def is_done(self, batch: int) -> bool:
        return bool(self.execute("SELECT 1 FROM queue WHERE batch = ? AND state = 'done'", batch))

    def failures(self, batch: int, reason: str) -> list[int]:
        """The slots that failed the batch for this reason, one entry a failure."""
        return [
            slot for (slot,) in self.execute("SELECT slot FROM failures WHERE batch = ? AND reason = ?", batch, reason)
        ]

    def give_back(self, batch: int, owner: Owner, reason: str) -> None:
        """Leaves the batch to others, first to those of another slot."""
        with self.alone():
            self.execute("INSERT INTO failures VALUES (?, ?, ?)", batch, owner.slot, reason)
            self.execute(
                "UPDATE queue SET state = 'free', owner = NULL, helper = NULL WHERE batch = ? AND state = 'taken'",
                batch,
            )

    def leave(self, owner: Owner, reason: str | None = None) -> int:
        """Takes the owner out of the list and frees its batches, each of them failed where there is a reason; how many
        these were.
        """
        with self.alone():
            batches = [
                batch
                for (batch,) in self.execute("SELECT batch FROM queue WHERE state = 'taken' AND owner = ?", owner.name)
            ]
            if reason:
                self.execute_many(
                    "INSERT INTO failures VALUES (?, ?, ?)", [(batch, owner.slot, reason) for batch in batches]
                )
            self.execute(
                "UPDATE queue SET state = 'free', owner = NULL, helper = NULL WHERE state = 'taken' AND owner = ?",
                owner.name,
            )
            self.execute("UPDATE queue SET helper = NULL WHERE helper = ?", owner.name)
            self.execute("DELETE FROM owners WHERE name = ?", owner.name)
            return len(batches)

    @property
    def is_over(self) -> bool:
        """Whether every batch of the queue is committed."""
        return self.last is not None and not self.execute("SELECT 1 FROM queue WHERE state != 'done' LIMIT 1")

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Leases:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
