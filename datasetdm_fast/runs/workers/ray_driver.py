"""One run on a Ray cluster: an actor a GPU, which work through one queue and publish the files; this process alone
commits the rows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import Any

from datasetdm_fast.errors import REFUSALS, Missing
from datasetdm_fast.runs.jobs.job import Job, check_room
from datasetdm_fast.runs.jobs.result import Result, close_run, read_result
from datasetdm_fast.runs.jobs.resume import count_rows, merge_with_stored
from datasetdm_fast.runs.jobs.writing import Quota, batches_of
from datasetdm_fast.runs.run_folder import object_store
from datasetdm_fast.runs.run_folder.document import read_document
from datasetdm_fast.runs.run_folder.folder import RunFolder, clean
from datasetdm_fast.runs.run_folder.ledger import DOUBTFUL
from datasetdm_fast.runs.run_settings import RunSpec, WorkerSettings
from datasetdm_fast.runs.workers.devices import pool_of
from datasetdm_fast.runs.workers.queue import Owner
from datasetdm_fast.runs.workers.ray_connection import address_of, first_line, join_cluster
from datasetdm_fast.runs.workers.ray_worker import Coordinator, RayWorker, RayWorkerSetup, RemoteQueue
from datasetdm_fast.runs.workers.spawn import Rank, Supervisor
from datasetdm_fast.runs.workers.worker import Callbacks
from datasetdm_fast.version import __version__

ALL_ADDRESSES = "Ray listens on all addresses of this machine until the run ends, and obeys only who has its token"
NOTHING_HERE = "Install it on every machine of the cluster: pip install 'datasetdm-fast[ray]'"


def run_on_cluster(cluster: Cluster, spec: RunSpec, job: Job | None, callbacks: Callbacks) -> Result:
    """The run, made by the workers of a cluster. Calls of Ray last long and its start replaces signal handlers, so they
    are made in a thread, and the main thread receives a signal at any moment.
    """
    with ThreadPoolExecutor(1, "ray") as thread:
        return thread.submit(_run, cluster, spec, callbacks).result()


def _run(cluster: Cluster, spec: RunSpec, callbacks: Callbacks) -> Result:
    begin = time.perf_counter()
    with closing(RayDriver(cluster, spec, callbacks)) as driver:
        try:
            with join_cluster(cluster.workers.cluster, cluster.workers.ranks, spec.folder) as nodes:
                if address_of(cluster.workers.cluster) is None:
                    callbacks.on_message(ALL_ADDRESSES)
                driver.lead(nodes)
        except tuple(REFUSALS.values()):
            if not callbacks.is_stopping():
                raise
        return driver.finish(begin)


@dataclass(frozen=True)
class Cluster:
    """The cluster of a run, and where its workers put the samples."""

    workers: WorkerSettings
    store: str = ""  # URL; empty: in the run folder
    makes_bucket: bool = False


@dataclass
class Actor:
    """A worker of the cluster; Ray starts it once there is room for it."""

    handle: Any
    call: Any
    cluster: str

    def ending(self) -> str | None:
        import ray

        if not ray.wait([self.call], timeout=0)[0]:
            return None
        try:
            ray.get(self.call)
        except ray.exceptions.RayError as error:
            if "No module named 'datasetdm_fast'" in str(error):
                cause = f"--cluster {self.cluster}: its machines have no datasetdm_fast"
                raise Missing(cause, NOTHING_HERE) from error
            return f"ended ({first_line(error)})"
        return ""

    def kill(self) -> None:
        import ray

        with suppress(ray.exceptions.RayError):
            ray.kill(self.handle)


class RayDriver(Supervisor):
    """The driver's side of a run: it fills the queue with what is missing, and commits what is made."""

    def __init__(self, cluster: Cluster, spec: RunSpec, callbacks: Callbacks):
        super().__init__(spec.folder, callbacks)
        self.cluster, self.spec, self.document = cluster, spec, read_document(spec.folder)
        self.store = object_store.ObjectStore(cluster.store) if cluster.store else None
        if self.store:
            self.store.require_bucket(is_made=cluster.makes_bucket)
            if self.document is None:
                self.store.require_empty()
        self.folder: RunFolder | None = None
        self.job: Job | None = None  # of the run folder, once that is open
        self.required: set[int] = set()

    def lead(self, nodes: Sequence[Mapping[str, float]]) -> None:
        """Has actors on these machines make the run."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        engine = self.spec.engine
        pool = pool_of(self.cluster.workers, engine.device, engine.threads, nodes)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        coordinator = ray.remote(num_cpus=0, scheduling_strategy=here)(Coordinator).remote()
        spec = replace(self.spec, folder=self.spec.folder.absolute(), engine=replace(engine, threads=pool.threads))
        callbacks = self.callbacks
        setup = RayWorkerSetup(
            spec,
            self.cluster.store,
            self.document,
            callbacks.describe,
            callbacks.on_start,
            coordinator,
        )
        self.setup = ray.put(setup)
        self.worker = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus, scheduling_strategy="SPREAD")(RayWorker)
        self.work(RemoteQueue(coordinator), pool.workers)

    def start(self, owner: Owner) -> Actor:
        handle = self.worker.remote()
        return Actor(handle, handle.work.remote(self.setup, owner), self.cluster.workers.cluster)

    def handle(self, rank: Rank, kind: str, *content: Any) -> None:
        if kind == "planned":
            self._open(*content)
        elif kind == "rows":
            rows = {row.request.index: row for row in content[0] if row.request.index in self.required}
            if rows:
                self.folder.commit(list(rows.values()))
                self.required -= rows.keys()
                super().handle(rank, "committed", sum(row.status != DOUBTFUL for row in rows.values()))
        else:
            super().handle(rank, kind, *content)

    def _open(self, job: Job, version: str, lines: Sequence[str]) -> None:
        """Opens the run folder for the plan that a worker has made, and fills the queue."""
        if version != __version__:
            where = f"--cluster {self.cluster.workers.cluster}: its machines have datasetdm_fast {version}"
            raise Missing(f"{where}, this one {__version__}", NOTHING_HERE)
        if self.folder is not None or self.callbacks.is_stopping():
            return
        job = replace(job, folder=self.spec.folder)
        if self.document is not None:
            job = replace(merge_with_stored(job, self.document), done=count_rows(job.folder))
        if not self.store:
            check_room(job)
        for line in lines:
            self.callbacks.on_message(line)
        self.job, self.folder, size = job, RunFolder(job.folder, job.document), job.plan.batch_size
        if self.store:
            self.store.note(job.folder)
        self.required = set(Quota(job, self.folder.ledger).missing())
        self.folder.unseal()
        batches, document = batches_of(self.required, size), self.folder.document
        self.queue.open(batches, frozenset(self.required), document, may_grow=job.replaces_quarantined)

    def _receive(self) -> None:
        super()._receive()
        if self.job is not None and self.job.replaces_quarantined and self.queue.is_all_made():
            self._read_reports()  # the rows of the last batches are reported before these are finished
            self.required = set(Quota(self.job, self.folder.ledger).missing())
            batches = batches_of(self.required, self.job.plan.batch_size)
            self.queue.grow(batches, frozenset(self.required))

    def finish(self, begin: float) -> Result:
        """The result, once the index files are there."""
        folder, number = self.spec.folder, self.spec.number
        if self.folder is None:
            return read_result(folder, number, 0, begin)
        clean(folder)  # what workers that were killed had half-written
        result = close_run(self.folder, number, self.committed, begin)
        if self.store:
            self.store.complete(folder)
        return result

    def close(self) -> None:
        if self.folder is not None:
            self.folder.close()
