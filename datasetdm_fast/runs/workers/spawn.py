"""Processes of a run on this machine: each claims batches or shards itself, and one that ends or hangs is replaced."""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

from datasetdm_fast.disk import storage
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
from datasetdm_fast.runs.workers.supervisor import Supervisor
from datasetdm_fast.runs.workers.worker import Callbacks, work_on_folder


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

    is_finishing = True

    def __init__(self, places: Sequence[Place], spec: RunSpec, callbacks: Callbacks):
        self.places, self.spec, self.callbacks = places, spec, callbacks
        self.place, self._state = str(spec.folder), ShardFolder(spec.folder / "state")
        self._is_complete, self._count, self._described = False, 0, False
        self.count_new()

    def begin(self, rank: int, name: str) -> SpawnedProcess:
        describe = None if self._described else self.callbacks.describe
        self._described = True
        return start_process(self.places[rank], self.spec, self.callbacks.on_start, make_batches, name, describe)

    def count_new(self) -> int:
        folder, before = self.spec.folder, self._count
        document = read_document(folder)
        if document is not None and (folder / LEDGER).exists():
            with Ledger(folder / LEDGER, read_only=True) as ledger:
                goal = goal_of(document["config"], max(self.spec.number, document["plan"]["number"]))
                self._is_complete = goal.is_reached(ledger.tally(goal.number, len(goal.names)))
                self._count = ledger.count() + ledger.count(QUARANTINED)
        return self._count - before

    def is_complete(self) -> bool:
        return self._is_complete

    def claims(self) -> dict[str, list[bytes]]:
        return claims_by_name(self._state)

    def free(self, name: str, *, died: bool) -> int:
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
