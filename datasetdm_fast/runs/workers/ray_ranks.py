"""Processes of a run in shards on a Ray cluster: an actor a GPU or a share of the cores, more as machines join."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasetdm_fast.errors import Missing, Stop
from datasetdm_fast.runs.run_folder.object_store import is_url
from datasetdm_fast.runs.run_folder.shard_places import shard_place
from datasetdm_fast.runs.run_folder.shards import ShardLedger
from datasetdm_fast.runs.run_settings import RunSpec, WorkerSettings
from datasetdm_fast.runs.workers.devices import Pool, pool_of
from datasetdm_fast.runs.workers.ray_connection import address_of, first_line, join_cluster
from datasetdm_fast.runs.workers.shard_ranks import SharedShards
from datasetdm_fast.runs.workers.shard_worker import ShardRank, work_on_shards
from datasetdm_fast.runs.workers.supervisor import Supervisor
from datasetdm_fast.runs.workers.worker import Callbacks
from datasetdm_fast.version import __version__

ALL_ADDRESSES = "Ray listens on all addresses of this machine until the run ends, and obeys only who has its token"
NOTHING_HERE = "Install it on every machine of the cluster: pip install 'datasetdm-fast[ray]'"


def run_on_cluster(workers: WorkerSettings, spec: RunSpec, ledger: ShardLedger, callbacks: Callbacks) -> None:
    """Returns as run_ranks does; Ray is called in a thread, so that the main one receives a signal at any moment."""
    with ThreadPoolExecutor(1, "ray") as thread:
        try:
            thread.submit(_run, workers, spec, ledger, callbacks).result()
        except Stop:
            if not callbacks.is_stopping():
                raise


def _run(workers: WorkerSettings, spec: RunSpec, ledger: ShardLedger, callbacks: Callbacks) -> None:
    with join_cluster(workers.cluster, workers.ranks, ledger.place.name):
        import ray

        if address_of(workers.cluster) is None:
            callbacks.on_message(ALL_ADDRESSES)
        pool = pool_of(workers, spec.engine.device, spec.engine.threads, _machines())
        spec = replace(spec, engine=replace(spec.engine, threads=pool.threads))
        worker = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus, scheduling_strategy="SPREAD")(RayWorker)

        name = ledger.place.name if is_url(ledger.place.name) else str(Path(ledger.place.name).absolute())

        def begin(rank: ShardRank) -> RayProcess:
            handle = worker.remote()
            return RayProcess(handle, handle.work.remote(spec, name, rank, callbacks.on_start, __version__), workers)

        Supervisor(SharedShards(begin, lambda: _count(pool, workers), spec, ledger), callbacks).work()


def _machines() -> list[dict[str, float]]:
    """The resources of the machines of the cluster."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _count(pool: Pool, workers: WorkerSettings) -> int:
    """The actors that the cluster has room for now, or as many as were asked for."""
    if workers.ranks or workers.gpus.isdecimal():
        return pool.workers
    machines = _machines()
    return sum(int(each.get("GPU", 0)) if pool.gpus else each.get("CPU", 0) >= 1 for each in machines)


@dataclass
class RayProcess:
    """A worker of the cluster; Ray starts it once there is room for it."""

    handle: Any
    call: Any
    workers: WorkerSettings

    def ending(self) -> str | Stop | None:
        import ray

        if not ray.wait([self.call], timeout=0)[0]:
            return None
        try:
            stop: Stop | None = ray.get(self.call)
            return stop or ""
        except ray.exceptions.RayError as error:
            if "No module named 'datasetdm_fast'" in str(error):
                cause = f"--cluster {self.workers.cluster}: its machines have no datasetdm_fast"
                raise Missing(cause, NOTHING_HERE) from error
            return f"ended ({first_line(error)})"

    def stop(self) -> None:
        self.kill()

    def kill(self) -> None:
        import ray

        with suppress(ray.exceptions.RayError):
            ray.kill(self.handle)


class RayWorker:
    """An actor that makes shards."""

    def work(
        self, spec: RunSpec, place: str, rank: ShardRank, on_start: Callable[[], None] | None, version: str
    ) -> Stop | None:
        """What it refuses, None once it has nothing left to do."""
        if on_start:
            on_start()
        try:
            if version != __version__:
                cause = f"a machine of the cluster has datasetdm_fast {__version__}, the driver {version}"
                raise Missing(cause, NOTHING_HERE)
            work_on_shards(spec, shard_place(place), rank, Callbacks(lambda job: []))
        except Stop as stop:
            return stop
        return None
