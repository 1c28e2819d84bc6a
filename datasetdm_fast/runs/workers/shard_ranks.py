"""Processes of a run in shards on this machine; each claims shards by itself, and one that ends is started again."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from datasetdm_fast.bug_report import report_bug
from datasetdm_fast.errors import Missing, Stop
from datasetdm_fast.runs.run_folder.shard_places import shard_place
from datasetdm_fast.runs.run_folder.shards import ShardLedger, list_shards, shard_size
from datasetdm_fast.runs.run_settings import RunSpec
from datasetdm_fast.runs.workers.devices import Place
from datasetdm_fast.runs.workers.shard_worker import ShardRank, release_claims, work_on_shards
from datasetdm_fast.runs.workers.spawn import MOST_DEATHS, WITH_PARENT, SpawnedProcess, end_with_parent, start_process
from datasetdm_fast.runs.workers.worker import Callbacks

SECONDS_BETWEEN_POLLS = 0.5  # of processes
LOOKS_SHARE = 0.05  # of the time that is spent on reading the manifest
SECONDS_TO_END = 1.0  # processes have once no shard is missing
_BOOT = WITH_PARENT + "from datasetdm_fast.runs.workers.shard_ranks import enter; enter()"


class RankProcess(Protocol):
    """A process of the run, on whatever machine."""

    def ending(self) -> str | Stop | None:
        """How it has ended, empty where nothing was left to do, or what it refused; None while it runs."""

    def kill(self) -> None: ...


@dataclass
class ShardProcess:
    """A rank and the process that fills it now."""

    process: RankProcess
    name: str
    deaths: int = 0  # since the last shard that was committed


def run_ranks(places: Sequence[Place], spec: RunSpec, ledger: ShardLedger, callbacks: Callbacks) -> None:
    """Returns once no shard is missing, or when the run is to stop; shards that are not complete are lost then."""

    def begin(rank: ShardRank) -> SpawnedProcess:
        work = ledger.place.name, rank, callbacks.on_start
        return start_process(_BOOT, places[rank.rank], spec, work, stdout=subprocess.PIPE)

    ShardSupervisor(begin, lambda: len(places), spec, ledger, callbacks).work()


class ShardSupervisor:
    """Starts as many processes as there is room for, replaces those that end, and counts entries of the manifest."""

    def __init__(
        self,
        begin: Callable[[ShardRank], RankProcess],
        count: Callable[[], int],
        spec: RunSpec,
        ledger: ShardLedger,
        callbacks: Callbacks,
    ):
        self.begin, self.count, self.spec, self.ledger, self.callbacks = begin, count, spec, ledger, callbacks
        self.ranks: list[ShardProcess] = []
        self.next_look = 0.0

    def work(self) -> None:
        was_complete = self._is_complete()  # then the processes check the settings
        try:
            while not self.callbacks.is_stopping() and (was_complete or not self._is_complete()):
                for rank in range(len(self.ranks), self.count()):
                    self.ranks.append(self._start(rank))
                time.sleep(SECONDS_BETWEEN_POLLS)
                if time.monotonic() > self.next_look:
                    self._count_new()
                endings = [each.process.ending() for each in self.ranks]
                for rank, how in enumerate(endings):
                    if how:
                        self._replace(rank, how)
                if all(how == "" for how in endings):
                    break
            end = time.monotonic() + SECONDS_TO_END * self._is_complete()
            while any(each.process.ending() is None for each in self.ranks) and time.monotonic() < end:
                time.sleep(SECONDS_BETWEEN_POLLS / 5)
        finally:
            running = [each for each in self.ranks if each.process.ending() is None]
            for each in running:
                each.process.kill()
            for each in running:
                release_claims(self.ledger.place, each.name)
        self._count_new()

    def _is_complete(self) -> bool:
        return len(self.ledger.entries) == -(-self.spec.number // shard_size(self.spec.identity))

    def _start(self, rank: int, deaths: int = 0) -> ShardProcess:
        name = uuid.uuid4().hex
        return ShardProcess(self.begin(ShardRank(rank, max(self.count(), rank + 1), name)), name, deaths)

    def _count_new(self) -> None:
        """Reads the entries that are new in the manifest and counts their samples."""
        begin = time.monotonic()
        for entry in self.ledger.read_entries(list_shards(self.ledger.place)):
            self.callbacks.on_commit(entry.stop - entry.first)
            for each in self.ranks:
                each.deaths = 0
        now = time.monotonic()
        self.next_look = now + (now - begin) / LOOKS_SHARE

    def _replace(self, rank: int, how: str | Stop) -> None:
        """Raises what a process that ended has refused; another one is replaced, unless it died too often."""
        each, place = self.ranks[rank], self.ledger.place
        deaths = each.deaths + 1
        if isinstance(how, Stop):
            if deaths == MOST_DEATHS or not isinstance(how, Missing):
                raise how
            how = f"refuses ({how.cause})"
        if deaths == MOST_DEATHS:
            raise Missing(
                f"{place.name}: a process of the run ended {MOST_DEATHS} times in a row ({how})",
                "Fix that and run the same command again: it resumes.",
            )
        self.callbacks.on_message(f"rank {rank} {how}, it is replaced")
        release_claims(place, each.name)
        self.ranks[rank] = self._start(rank, deaths)


def enter() -> None:
    """One process of the run, from its start to its end; what it refuses is its standard output."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent alone decides
        signal.signal(number, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "wb") as report:
        os.dup2(2, 1)
        spec, place, rank, on_start = pickle.load(sys.stdin.buffer)
        end_with_parent()
        if on_start:
            on_start()
        try:
            work_on_shards(spec, shard_place(place), rank, Callbacks(lambda job: []))
        except Stop as stop:
            pickle.dump(stop, report)
            report.flush()
            sys.exit(stop.exit_code)
        except Exception as error:
            sys.exit(report_bug(error))
