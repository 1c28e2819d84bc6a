"""Which process of a run works on which batch, and what each reports; worth nothing after the run, so never synced."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import sqlite

DIED, NOT_FINITE = "died", "not finite"  # reasons of a failure
_SCHEMA = """
CREATE TABLE session (last INTEGER, is_stopping INTEGER NOT NULL);
INSERT INTO session VALUES (NULL, 0);
CREATE TABLE queue (
    place INTEGER PRIMARY KEY, batch INTEGER NOT NULL UNIQUE, owner TEXT, helper TEXT, since REAL,
    state TEXT NOT NULL CHECK (state IN ('free', 'taken', 'done'))
);
CREATE INDEX unfinished ON queue (state, place) WHERE state != 'done';
CREATE TABLE failures (batch INTEGER NOT NULL, slot INTEGER NOT NULL, reason TEXT NOT NULL);
CREATE INDEX failed ON failures (batch);
CREATE TABLE owners (
    name TEXT PRIMARY KEY, slot INTEGER NOT NULL, host TEXT NOT NULL, process INTEGER NOT NULL, beats INTEGER NOT NULL
);
CREATE TABLE reports (number INTEGER PRIMARY KEY, report TEXT NOT NULL);
"""
# A batch goes to a slot that has not failed it, and to any once every slot with a process has.
_TAKEABLE = """
SELECT place, batch FROM queue
WHERE state = 'free' AND NOT (SELECT is_stopping FROM session)
AND (SELECT count(*) FROM failures f WHERE f.batch = queue.batch) {} 0 AND (
    NOT EXISTS (SELECT 1 FROM failures f WHERE f.batch = queue.batch AND f.slot = ?)
    OR NOT EXISTS (SELECT 1 FROM owners WHERE slot NOT IN (SELECT slot FROM failures f WHERE f.batch = queue.batch))
) ORDER BY place LIMIT 1
"""


@dataclass(frozen=True)
class Owner:
    """A process that takes batches; a slot is a device, or a place beside others, and outlives its processes."""

    name: str
    slot: int
    host: str = ""
    process: int = 0


class WorkQueue:
    """The queue of a run in a file that its processes share, or in memory, for any thread."""

    def __init__(self, path: Path | None = None):
        if path is None:
            self._database = sqlite.Database(Path("queue"), ":memory:")
            self._database.execute_script(_SCHEMA)
        else:
            self._database = sqlite.connect(path, _SCHEMA, sqlite.IN_PLACE, "PRAGMA synchronous=OFF")

    def alone(self) -> AbstractContextManager[None]:
        """No other process changes the queue, or is in such a block of its own, within this one."""
        return self._database.transaction()

    def execute(self, statement: str, *values: object) -> list[tuple]:
        return self._database.execute(statement, values)

    def last(self) -> int | None:
        """The last sample that is wanted; None before the queue is filled."""
        return self.execute("SELECT last FROM session")[0][0]

    def fill(self, batches: Sequence[int], last: int) -> None:
        """Adds the batches, in this order; to be called within `alone`, and once."""
        self.execute("UPDATE session SET last = ?", last)
        free = "INSERT INTO queue (batch, state) SELECT value, 'free' FROM json_each(?) ORDER BY key"
        self.execute(free, json.dumps(batches))

    def enter(self, owner: Owner) -> None:
        """Adds a process that has given no sign of life yet, in the place of the one that was to be in its slot."""
        for (name,) in self.execute("SELECT name FROM owners WHERE slot = ? AND name != ?", owner.slot, owner.name):
            self.leave(Owner(name, owner.slot), DIED)
        values = (owner.name, owner.slot, owner.host, owner.process)
        self.execute("INSERT OR REPLACE INTO owners VALUES (?, ?, ?, ?, 0)", *values)

    def leave(self, owner: Owner, reason: str | None = None) -> int:
        """Removes a process and frees its batches, each of them failed where there is a reason; how many these were."""
        with self.alone():
            rows = self.execute("SELECT batch FROM queue WHERE state = 'taken' AND owner = ?", owner.name)
            for (batch,) in rows:
                self._free(batch, owner, reason)
            self.execute("UPDATE queue SET helper = NULL WHERE helper = ?", owner.name)
            self.execute("DELETE FROM owners WHERE name = ?", owner.name)
            return len(rows)

    def _free(self, batch: int, owner: Owner, reason: str | None) -> None:
        if reason:
            self.execute("INSERT INTO failures VALUES (?, ?, ?)", batch, owner.slot, reason)
        free = "state = 'free', owner = NULL, helper = NULL"
        self.execute(f"UPDATE queue SET {free} WHERE batch = ? AND state = 'taken'", batch)

    def owners(self) -> dict[Owner, int]:
        """The processes at work, with their signs of life, negative where the last was of a process without work."""
        rows = self.execute("SELECT name, slot, host, process, beats FROM owners")
        return {Owner(*owner): beats for *owner, beats in rows}

    def beat(self, owner: str, *, is_idle: bool = False) -> None:
        """A sign of life, to be given only where work has gone on, or where there is none."""
        sign = "-" if is_idle else ""
        self.execute(f"UPDATE owners SET beats = {sign}(abs(beats) + 1) WHERE name = ?", owner)

    def take(self, owner: Owner, *, is_fresh: bool = True) -> int | None:
        """The next batch, now this owner's: one that has not failed yet, or else one that has."""
        with self.alone():
            for place, batch in self.execute(_TAKEABLE.format("=" if is_fresh else ">"), owner.slot):
                taken = "UPDATE queue SET state = 'taken', owner = ?, helper = NULL, since = ? WHERE place = ?"
                self.execute(taken, owner.name, time.time(), place)
                return batch

    def help(self, owner: Owner, seconds: float) -> int | None:
        """A batch that one other process has been making for longer than this, and this owner now makes too."""
        late = "state = 'taken' AND owner != ? AND helper IS NULL AND since < ?"
        with self.alone():
            rows = self.execute(f"SELECT place, batch FROM queue WHERE {late}", owner.name, time.time() - seconds)
            for place, batch in sorted(rows)[:1]:
                self.execute("UPDATE queue SET helper = ? WHERE place = ?", owner.name, place)
                return batch

    def finish(self, batch: int, more: Callable[[], Sequence[int]] = tuple) -> bool:
        """Whether this is the first report of the batch; once all are done, those of `more` are added."""
        with self.alone():
            is_first = bool(self.execute("SELECT 1 FROM queue WHERE batch = ? AND state != 'done'", batch))
            self.execute("UPDATE queue SET state = 'done', owner = NULL, helper = NULL WHERE batch = ?", batch)
            if not self._has_unfinished():
                self._add(more())
            return is_first

    def _has_unfinished(self) -> bool:
        return bool(self.execute("SELECT 1 FROM queue WHERE state != 'done' LIMIT 1"))

    def _add(self, batches: Sequence[int]) -> None:
        """Adds batches that the run has come to need, finished ones among them."""
        for batch in batches:
            on_conflict = "ON CONFLICT (batch) DO UPDATE SET state = 'free'"
            self.execute(f"INSERT INTO queue (batch, state) VALUES (?, 'free') {on_conflict}", batch)

    def give_back(self, batch: int, owner: Owner, reason: str) -> None:
        """Frees a batch that has failed, first for other slots."""
        with self.alone():
            self._free(batch, owner, reason)

    def failures(self, batch: int, reason: str) -> list[int]:
        """The slots where the batch failed for this reason, one entry a failure."""
        rows = self.execute("SELECT slot FROM failures WHERE batch = ? AND reason = ?", batch, reason)
        return [slot for (slot,) in rows]

    def stop(self) -> None:
        """Nothing more is to be begun."""
        self.execute("UPDATE session SET is_stopping = 1")

    def is_complete(self) -> bool:
        """Whether every batch is committed."""
        return self.last() is not None and not self._has_unfinished()

    def is_over(self) -> bool:
        """Whether nothing is left to be taken, now or later."""
        return self.is_complete() or bool(self.execute("SELECT is_stopping FROM session")[0][0])

    def report(self, slot: int, kind: str, *content: Any) -> None:
        """Reports to the supervisor of this place; content that JSON can hold."""
        self.execute("INSERT INTO reports (report) VALUES (?)", json.dumps([slot, kind, *content]))

    def reports(self) -> list[list[Any]]:
        """Slot, kind and content of everything reported, each once, in the order of its coming; for one process."""
        rows = self.execute("SELECT number, report FROM reports ORDER BY number")
        if rows:
            self.execute("DELETE FROM reports WHERE number <= ?", rows[-1][0])
        return [json.loads(report) for _, report in rows]

    def close(self) -> None:
        self._database.close()
