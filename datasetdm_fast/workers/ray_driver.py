"""One run on a Ray cluster: Ray Data keeps an actor a GPU, which work through one queue and publish the files; this
process alone commits the rows.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasetdm_fast.config import RunConfig
from datasetdm_fast.errors import REFUSALS, GateFailed, Missing, Refused
from datasetdm_fast.generation import result
from datasetdm_fast.generation.job import adopt, check_room, count_rows
from datasetdm_fast.generation.prompts import read_source
from datasetdm_fast.generation.result import Result, look
from datasetdm_fast.generation.run import in_order, lacking
from datasetdm_fast.generation.settings import count_images
from datasetdm_fast.run_folder import object_store
from datasetdm_fast.run_folder.document import read_document
from datasetdm_fast.run_folder.folder import RunFolder, clean
from datasetdm_fast.version import __version__
from datasetdm_fast.workers.devices import Pool, pool_of
from datasetdm_fast.workers.heartbeat import MOST_DEATHS, QueueMonitor
from datasetdm_fast.workers.ray_connection import CONNECT_SECONDS, first_line, joined
from datasetdm_fast.workers.ray_worker import Coordinator, Failures, RayWorker, RayWorkerSetup, RemoteQueue, plan
from datasetdm_fast.workers.worker import Callbacks

MOST_ROUNDS = 3  # without a single commit, after which the run ends
SECONDS_BETWEEN_POLLS = 0.25  # of the coordinator
CALLS_AHEAD = 2  # of an actor; Ray Data starts another one where all have as many
NOTHING_HERE = "Install it on every machine of the cluster: pip install datasetdm_fast[ray]"


def run(config: RunConfig, callbacks: Callbacks) -> Result:
    """The run, made by the workers of a cluster."""
    begin = time.perf_counter()
    with closing(RayDriver(config, callbacks)) as driver:
        while driver.is_open:
            with joined(config) as nodes:
                driver.work(pool_of(config, nodes))
        return driver.finish(time.perf_counter() - begin)


class RayDriver:
    """The driver's side of a run: it fills the queue with what is missing, round after round, and commits what is
    made.
    """

    def __init__(self, config: RunConfig, callbacks: Callbacks):
        self.config, self.source, self.callbacks = config, read_source(config), callbacks
        self.store = object_store.ObjectStore(config.store) if config.store else None
        self.folder: RunFolder | None = None
        self.wanted: set[int] = set()
        self.failures = Failures()
        self.committed, self.rounds_in_vain = 0, 0

    @property
    def is_open(self) -> bool:
        return not self.callbacks.is_stopping() and (self.folder is None or bool(self.wanted))

    def work(self, pool: Pool) -> None:
        """One round: normally the only one; another where workers fell silent, with those that the cluster has then."""
        out, threads = os.path.abspath(self.config.out), pool.threads
        config = replace(self.config, out=out, threads=threads, quiet=True, gpus="", ranks=0)
        setup = RayWorkerSetup(config, self.source, read_document(Path(out)), self.callbacks.on_start)
        if self.folder is None and not self._open(setup, pool):
            return
        before = self.committed
        self._round(setup, pool)
        self.rounds_in_vain = 0 if self.committed > before else self.rounds_in_vain + 1
        if self.wanted and not self.callbacks.is_stopping() and self.rounds_in_vain == MOST_ROUNDS:
            logs = "See their logs in /tmp/ray/session_latest/logs, then run the same line again"
            raise Missing(
                f"{self.config.out}: the workers fell silent {MOST_ROUNDS} times in a row without a sample",
                f"{logs}: it goes on where it stopped.",
            )

    def _open(self, setup: RayWorkerSetup, pool: Pool) -> bool:
        """Lets a worker make the plan and opens the run folder with it; False where it is to stop before that."""
        import ray

        asked = ray.remote(max_retries=MOST_DEATHS, **pool.resources)(plan).remote(setup, self.callbacks.describe)
        with self._explained():
            while not ray.wait([asked], timeout=SECONDS_BETWEEN_POLLS)[0]:
                if self.callbacks.is_stopping():
                    return False
            kind, *content = ray.get(asked)
        if kind == "refused":
            name, cause, remedy = content
            raise REFUSALS[name](cause, remedy)
        job, lines, version = content
        if version != __version__:
            there = f"--cluster {self.config.cluster}: its machines have datasetdm_fast {version}"
            raise Missing(f"{there}, this one {__version__}", NOTHING_HERE)
        job = replace(job, config=self.config)
        if setup.document is not None:
            job = replace(adopt(job, setup.document), done=count_rows(self.config))
        if not self.store:
            check_room(job)
        for line in lines:
            self.callbacks.on_message(line)
        self.plan, self.folder = job.plan, RunFolder(job.folder, job.document)
        if self.store:
            self.store.note(job.folder)
        self.wanted = lacking(self.folder.ledger, job.plan.number, self.config.limit)
        self.folder.unseal()
        return True

    def _round(self, setup: RayWorkerSetup, pool: Pool) -> None:
        """Commits what the workers make until they are done, or have been silent for too long."""
        import ray

        size, last = self.plan.batch_size, max(self.wanted, default=-1)
        batches = in_order(self.wanted, size)
        planned = {index for batch in batches for index in range(batch * size, (batch + 1) * size)}
        here = ray.get_runtime_context().get_node_id()
        pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
        coordinator = ray.remote(num_cpus=0, scheduling_strategy=pinned)(Coordinator).remote(
            batches, last, min(pool.places, pool.least), pool.most, self.failures
        )
        document, present = self.folder.document, frozenset(planned - self.wanted)
        setup = replace(setup, document=document, coordinator=coordinator, last=last, present=present)
        with self._explained(coordinator):
            self._supervise(RemoteQueue(coordinator), started(setup, pool))

    def _supervise(self, queue: RemoteQueue, ended: list[BaseException | None]) -> None:
        monitor, begin, is_told_to_stop = QueueMonitor(queue, self.callbacks.patience), time.monotonic(), False
        while self.wanted:
            has_ended = bool(ended)
            self._collect(queue)
            if has_ended:
                if ended[0] is not None:
                    raise ended[0]
                return
            if self.callbacks.is_stopping() and not is_told_to_stop:
                is_told_to_stop = True
                queue.stop()
            working, lost = monitor.look()
            seconds = min(lost.values(), default=time.monotonic() - begin)
            if not working and (lost or seconds > self.callbacks.patience.start):
                self.callbacks.on_message(f"no worker has given a sign of life for {seconds:.0f} s, they are replaced")
                self.failures = queue.all_failures()
                return
            time.sleep(SECONDS_BETWEEN_POLLS)

    def _collect(self, queue: RemoteQueue) -> None:
        """Commits the rows the workers have reported, and passes on what there is to say."""
        found, lines = queue.collect()
        for line in lines:
            self.callbacks.on_message(line)
        rows = {row.request.index: row for row in found if row.request.index in self.wanted}
        if rows:
            self.folder.ledger.commit(rows.values())
            self.wanted -= rows.keys()
            self.committed += len(rows)
            self.callbacks.on_commit(len(rows))

    @contextmanager
    def _explained(self, coordinator: Any = None) -> Iterator[None]:
        """Raises what a worker refused as it was refused; what Ray says, in a sentence."""
        import ray

        try:
            yield
        except (Refused, Missing, GateFailed):
            raise
        except Exception as error:
            if self.callbacks.is_stopping():
                return
            refusal = None
            with suppress(Exception):
                refusal = ray.get(coordinator.refusal.remote(), timeout=CONNECT_SECONDS)
            if refusal:
                name, cause, remedy = refusal
                raise REFUSALS[name](cause, remedy) from error
            if "No module named 'datasetdm_fast'" in str(error):
                cause = f"--cluster {self.config.cluster}: its machines have no datasetdm_fast"
                raise Missing(cause, NOTHING_HERE) from error
            raise Missing(
                f"{self.config.out}: Ray ended the run ({type(error).__name__}: {first_line(str(error))})",
                "Run the same line again: it goes on where it stopped.",
            ) from error

    def finish(self, seconds: float) -> Result:
        """The result, once the index files are there."""
        folder, number = Path(self.config.out), count_images(self.config)
        if self.folder is None:
            return look(folder, number, 0, seconds)
        clean(folder)  # what workers that were killed had half-written
        self.folder.rebuild()
        if self.store:
            self.store.complete(folder)
        return result.result_of(folder, number, self.folder.ledger, self.committed, seconds)

    def close(self) -> None:
        if self.folder is not None:
            self.folder.close()


def started(setup: RayWorkerSetup, pool: Pool) -> list[BaseException | None]:
    """Starts the workers, which Ray restarts where they die; the list gets its only entry once all of them have ended,
    an error where there was one.
    """
    import ray.data

    calls = list(range(CALLS_AHEAD * pool.most))  # enough for every actor; those that are too many end at once
    size = {"size": pool.most} if pool.least == pool.most else {"min_size": pool.least, "max_size": pool.most}
    actors = ray.data.ActorPoolStrategy(**size, max_tasks_in_flight_per_actor=CALLS_AHEAD)
    dataset = ray.data.from_items(calls, override_num_blocks=len(calls)).map_batches(
        RayWorker, fn_constructor_args=(setup,), batch_size=None, compute=actors, **pool.resources
    )
    ended: list[BaseException | None] = []

    def consume() -> None:
        try:
            for _ in dataset.iter_batches(batch_size=None, prefetch_batches=0):
                pass
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    threading.Thread(target=consume, name="workers", daemon=True).start()
    return ended
