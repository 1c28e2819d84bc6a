"""Processes of a run on this machine: each claims batches or shards itself, and one that ends or hangs is replaced."""

import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Stop
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.jobs.writing import Result, close_folder
from datasetdm_fast.runs.run_folder.document import LEDGER, LOCK, read_document
from datasetdm_fast.runs.run_folder.folder import clean
from datasetdm_fast.runs.run_folder.goal import goal_of
from datasetdm_fast.runs.run_folder.ledger import QUARANTINED, Ledger
from datasetdm_fast.runs.run_folder.shard_places import ShardFolder, shard_place
from datasetdm_fast.runs.run_folder.shards import ShardLedger, list_shards
from datasetdm_fast.runs.run_settings import RunSpec
from datasetdm_fast.runs.workers.claims import claims_by_name, free_claims
from datasetdm_fast.runs.workers.devices import Place
from datasetdm_fast.runs.workers.processes import SpawnedProcess, start_process
from datasetdm_fast.runs.workers.shard_worker import ShardRank, files_of_shard, work_on_shards
from datasetdm_fast.runs.workers.worker import Callbacks, work_on_folder

MOST_DEATHS = 5  # in a row, without progress, after which a place stays empty
LONGEST_WAIT = 30.0  # seconds before a process that has just died again is replaced
SECONDS_BETWEEN_POLLS = 0.25  # of processes
LOOKS_SHARE = 0.05  # of the time that is spent on reading what they have committed
SECONDS_TO_END = 1.0  # processes have once nothing is missing


def run_spawned(places: Sequence[Place], spec: RunSpec, callbacks: Callbacks) -> Result:
    """The run, made by one process a place."""
    folder, begin = spec.folder, time.perf_counter()
    if "torch" in sys.modules:  # engines that were compared before: the first process would lack their memory
        from datasetdm_fast.engine.engines.device import release

        release()
    storage.make_folder(folder / "state")
    with storage.hold_lock(folder / LOCK):
        clean(folder)
        try:
            supervisor = Supervisor(SharedFolder(places, spec, callbacks), callbacks)
            supervisor.work()
        finally:  # a finished run that refuses other settings stays as it was
            clean(folder)
        return close_folder(folder, spec.number, supervisor.committed, begin)


class SharedFolder:
    """A run folder that processes of this machine share."""

    is_finishing = True  # whether processes that are to stop finish what they make

    def __init__(self, places: Sequence[Place], spec: RunSpec, callbacks: Callbacks):
        self.places, self.spec, self.callbacks = places, spec, callbacks
        self.place, self._state = str(spec.folder), ShardFolder(spec.folder / "state")
        self._is_complete, self._count, self._described = False, 0, False
        self.count_new()

    def begin(self, rank: int, name: str) -> SpawnedProcess:
        """Starts the process of a place, whose claims have this name."""
        describe = None if self._described else self.callbacks.describe
        self._described = True
        return start_process(self.places[rank], self.spec, self.callbacks.on_start, make_batches, name, describe)

    def count_new(self) -> int:
        """Samples that were committed since the last call."""
        folder, before = self.spec.folder, self._count
        document = read_document(folder)
        if document is not None and (folder / LEDGER).exists():
            with Ledger(folder / LEDGER, read_only=True) as ledger:
                goal = goal_of(document["config"], max(self.spec.number, document["plan"]["number"]))
                self._is_complete = goal.is_reached(ledger.tally(goal.number, len(goal.names)))
                self._count = ledger.count() + ledger.count(QUARANTINED)
        return self._count - before

    def is_complete(self) -> bool:
        """Whether nothing was missing at that call."""
        return self._is_complete

    def claims(self) -> dict[str, list[bytes]]:
        """The claims of each process by its name; none where hanging processes are not ended."""
        return claims_by_name(self._state)

    def free(self, name: str, *, died: bool) -> int:
        """Frees what a process that has ended was making, and counts its death; how many parts that were."""
        return free_claims(self._state, name, lambda batch: (), died=died)


def make_batches(
    spec: RunSpec, name: str, describe: Callable[[Job], list[str]] | None, is_stopping: Callable[[], bool]
) -> None:
    """The work of one process; the first describes the run on standard error."""
    on_message = partial(print, file=sys.stderr, flush=True)
    work_on_folder(spec, Callbacks(describe, on_message, is_stopping=is_stopping), name)


def run_ranks(places: Sequence[Place], spec: RunSpec, ledger: ShardLedger, callbacks: Callbacks) -> None:
    """Returns once no shard is missing, or when the run is to stop; shards that are not complete are lost then."""
    Supervisor(SharedShards(places, spec, ledger, callbacks), callbacks).work()


class SharedShards:
    """A run in shards that processes of this machine share."""

    is_finishing = False

    def __init__(self, places: Sequence[Place], spec: RunSpec, ledger: ShardLedger, callbacks: Callbacks):
        self.places, self._spec, self._ledger, self._on_start = places, spec, ledger, callbacks.on_start
        self.place, self._number = ledger.place.name, spec.number

    def begin(self, rank: int, name: str) -> SpawnedProcess:
        shard_rank = ShardRank(rank, len(self.places), name)
        return start_process(self.places[rank], self._spec, self._on_start, make_shards, self.place, shard_rank)

    def count_new(self) -> int:
        entries = self._ledger.read_entries(list_shards(self._ledger.place))
        return sum(entry.stop - entry.first for entry in entries)

    def is_complete(self) -> bool:
        return self._ledger.made == self._number

    def claims(self) -> dict[str, list[bytes]]:
        return {}  # which a store gives one by one

    def free(self, name: str, *, died: bool) -> int:
        return free_claims(self._ledger.place, name, files_of_shard, died=False)


def make_shards(spec: RunSpec, place: str, rank: ShardRank, is_stopping: Callable[[], bool]) -> None:
    """The work of one process."""
    work_on_shards(spec, shard_place(place), rank, Callbacks(is_stopping=is_stopping))


@dataclass
class Rank:
    """A place and the process that fills it now."""

    process: SpawnedProcess | None = None
    name: str = ""
    is_done: bool = False  # whether a process found nothing left to do
    deaths: int = 0  # in a row
    next_start: float = 0.0  # when to start the next process
    committed: int = 0  # samples of the run when the process began
    sign: list[bytes] | None = None  # its last claims
    since: float = 0.0  # when these were first seen
    how: str | Stop = ""  # its last process ended

    @property
    def is_over(self) -> bool:
        """Whether no other process will fill it."""
        return self.is_done or self.deaths == MOST_DEATHS


class Supervisor:
    """Fills the places of a run with processes until nothing is missing."""

    def __init__(self, run: SharedFolder | SharedShards, callbacks: Callbacks):
        self.run, self.callbacks = run, callbacks
        self.ranks = [Rank() for _ in run.places]
        self.committed, self.next_look = 0, 0.0

    def work(self) -> None:
        """Returns once nothing is missing, or when it is to stop, once no process works any more."""
        was_complete = self.run.is_complete()  # then the processes check the settings
        try:
            while not self.callbacks.is_stopping() and (was_complete or not self.run.is_complete()):
                self._fill_places()
                self._watch()
                if all(rank.is_over for rank in self.ranks) and any(rank.is_done for rank in self.ranks):
                    break
            if self.callbacks.is_stopping() and self.run.is_finishing:
                self._finish()
            end = time.monotonic() + SECONDS_TO_END * self.run.is_complete()
            while self._running() and time.monotonic() < end:
                self._watch(is_ending=True)
        finally:
            for rank in self._running():
                rank.process.kill()
                self.run.free(rank.name, died=False)
        self._look()

    def _running(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.process]

    def _fill_places(self) -> None:
        if all(rank.deaths == MOST_DEATHS for rank in self.ranks):
            for how in (rank.how for rank in self.ranks):
                if isinstance(how, Stop):
                    raise how
            words = "; ".join(dict.fromkeys(str(rank.how) for rank in self.ranks))
            raise Missing(
                f"{self.run.place}: every process of the run ended {MOST_DEATHS} times in a row ({words})",
                "Fix that and run the same command again: it resumes.",
            )
        for number, rank in enumerate(self.ranks):
            if not rank.process and not rank.is_over and time.monotonic() >= rank.next_start:
                rank.name, rank.sign, rank.committed = uuid.uuid4().hex, None, self.committed
                rank.process = self.run.begin(number, rank.name)

    def _watch(self, *, is_ending: bool = False) -> None:
        """Waits a little, counts what was committed, and deals with processes that have ended or hang."""
        time.sleep(SECONDS_BETWEEN_POLLS)
        endings = [(rank, rank.process.ending()) for rank in self._running()]
        if time.monotonic() > self.next_look:
            self._look()
            self._end_silent()
        for number, rank in enumerate(self.ranks):
            for how in (how for other, how in endings if other is rank and how is not None):
                rank.process, rank.is_done = None, how == ""
                if how and not is_ending:
                    self._note_death(number, rank, how)

    def _look(self) -> None:
        begin = time.monotonic()
        if new := self.run.count_new():
            self.committed += new
            self.callbacks.on_commit(new)
        now = time.monotonic()
        self.next_look = now + (now - begin) / LOOKS_SHARE

    def _end_silent(self) -> None:
        """Ends processes that have not renewed their claims; they are then replaced like others that ended."""
        claims, now = self.run.claims(), time.monotonic()
        for number, rank in enumerate(self.ranks):
            sign = claims.get(rank.name, [])
            if sign != rank.sign:
                rank.sign, rank.since = sign, now
            elif sign and rank.process and now - rank.since > self.callbacks.patience:
                self.callbacks.on_message(f"rank {number} has given no sign of life for {now - rank.since:.0f} s")
                rank.process.kill()

    def _note_death(self, number: int, rank: Rank, how: str | Stop) -> None:
        """Decides whether a process that ended is replaced; what keeps the first from starting keeps all of them."""
        self._look()
        was_working = self.run.free(rank.name, died=True) and self.committed > rank.committed
        if isinstance(how, Stop) and not (isinstance(how, Missing) and self.committed):
            raise how
        rank.deaths, rank.how = 1 if was_working else rank.deaths + 1, how
        rank.next_start = time.monotonic() + min(2.0 ** (rank.deaths - 1) - 1, LONGEST_WAIT)
        words = f"refuses ({how.cause})" if isinstance(how, Stop) else how
        then = f"not replaced any more, after {MOST_DEATHS} deaths in a row"
        self.callbacks.on_message(f"rank {number} {words}, it is {'replaced' if rank.deaths < MOST_DEATHS else then}")

    def _finish(self) -> None:
        """Waits until every process has finished what it makes; one that makes nothing is ended."""
        claims = self.run.claims()
        for rank in self._running():
            rank.process.stop()
            if rank.name not in claims:
                rank.process.kill()
        while self._running():
            self._watch(is_ending=True)
