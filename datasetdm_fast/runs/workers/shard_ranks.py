"""Processes of a run in shards on this machine: each claims shards by itself, and one that ends is replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from datasetdm_fast.runs.run_folder.shard_places import shard_place
from datasetdm_fast.runs.run_folder.shards import ShardLedger, list_shards
from datasetdm_fast.runs.run_settings import RunSpec
from datasetdm_fast.runs.workers.claims import free_claims
from datasetdm_fast.runs.workers.devices import Place
from datasetdm_fast.runs.workers.processes import SpawnedProcess, start_process
from datasetdm_fast.runs.workers.shard_worker import ShardRank, files_of_shard, work_on_shards
from datasetdm_fast.runs.workers.supervisor import Supervisor
from datasetdm_fast.runs.workers.worker import Callbacks


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
