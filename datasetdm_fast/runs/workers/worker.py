"""The work of one process of a run: it takes batches from the queue, and decides what becomes of failed ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from datasetdm_fast.data import Batch, Quarantined, Sample
from datasetdm_fast.disk import sqlite
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.jobs.run import merge_with_stored
from datasetdm_fast.runs.jobs.writing import BackgroundWriter, DomainGate, Quota, batch_facts, batches_of, make_samples
from datasetdm_fast.runs.run_folder.document import read_document
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.goal import counts_by_class
from datasetdm_fast.runs.run_folder.ledger import DOUBTFUL, Row
from datasetdm_fast.runs.workers.heartbeat import USUAL, Patience
from datasetdm_fast.runs.workers.queue import DIED, NOT_FINITE, Owner, WorkQueue

MOST_FAILURES = 3  # deaths of processes while they made a batch, after which it is quarantined
SECONDS_BETWEEN_BEATS = 1.0  # signs of life
SECONDS_BETWEEN_TRIES = 0.2  # to take a batch where there is none
LATE_FACTOR = 2.0  # average times of a batch after which that of another process is made a second time
LEAST_LATE_SECONDS = 5.0


@dataclass(frozen=True)
class Callbacks:
    """How the processes of a run and the command that starts them reach each other."""

    describe: Callable[[Job], list[str]]  # lines about a job, for the screen
    on_message: Callable[[str], None] = lambda line: None  # with every line for the screen
    on_commit: Callable[[int], None] = lambda count: None  # with the samples of every commit
    on_unet_call: Callable[[], None] = lambda: None  # after every call, of a run in this process
    is_stopping: Callable[[], bool] = lambda: False  # asked between two batches
    on_start: Callable[[], None] | None = None  # called by every process before anything else
    patience: Patience = USUAL


def join_run(job: Job, queue: WorkQueue, journal: str = sqlite.WRITE_AHEAD) -> tuple[Job, RunFolder]:
    """The job and its run folder, open for a member; the first process makes the folder and fills the queue."""
    with queue.alone():
        stored = read_document(job.folder)
        if stored is not None:
            job = merge_with_stored(job, stored)
        folder = RunFolder(job.folder, job.document, is_member=True, journal=journal)
        if queue.last() is None:
            missing = Quota(job, folder.ledger).missing()
            queue.fill(batches_of(missing, job.plan.batch_size), max(missing, default=-1))
    return job, folder


class Worker:
    """Makes batches of a queue; `on_commit` gets the samples first committed here, `on_idle` is for waits."""

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        queue: WorkQueue,
        owner: Owner,
        on_commit: Callable[[int], None] = lambda count: None,
        on_idle: Callable[[], object] = lambda: None,
        is_stopping: Callable[[], bool] = lambda: False,
    ):
        self.job, self.folder, self.queue, self.owner = job, folder, queue, owner
        self.gate, self.counts_by_class = DomainGate(job), counts_by_class(job.document["config"])
        self.on_commit, self.on_idle, self.is_stopping = on_commit, on_idle, is_stopping
        self.last_beat, self.made = 0.0, 0
        self.seconds, self.count = 0.0, 0  # spent on batches, and how many these were

    def work(self) -> None:
        """Makes batches until none is left, or until it is to stop, and then leaves the queue."""
        self.queue.enter(self.owner)
        self.gate.evaluate_stored(self.folder.ledger)
        while not self.is_stopping() and self._turn():
            pass
        self.queue.leave(self.owner)

    def _beat(self, *, is_idle: bool = False) -> None:
        """A sign of life, at most one a second, to be called while work proceeds or there is none."""
        if time.monotonic() - self.last_beat >= SECONDS_BETWEEN_BEATS:
            self.last_beat = time.monotonic()
            self.queue.beat(self.owner.name, is_idle=is_idle)

    def _turn(self) -> bool:
        """Makes what can be taken now, or waits a little; False where nothing will be left to be taken."""
        begin = time.monotonic()
        if (batch := self.queue.take(self.owner)) is not None:
            self._make(chain([batch], self._fresh()))
            self.seconds += time.monotonic() - begin
        elif (batch := self.queue.take(self.owner, is_fresh=False)) is not None:
            self._retry(batch)
        elif self.queue.is_over():
            return False
        else:
            self._beat(is_idle=True)
            self.on_idle()
            if (batch := self._late()) is not None:
                self._make([batch])
            else:
                time.sleep(SECONDS_BETWEEN_TRIES)
        return True

    def _fresh(self) -> Iterator[int]:
        """Batches that have not failed, until there is none or it is time to stop."""
        while not self.is_stopping() and (batch := self.queue.take(self.owner)) is not None:
            yield batch

    def _retry(self, batch: int) -> None:
        """Retries a failed batch alone, so that another failure has one reason, or quarantines it."""
        if len(self.queue.failures(batch, DIED)) < MOST_FAILURES:
            self._make([batch])
            return
        reason = f"{MOST_FAILURES} processes ended while they made its batch"
        with BackgroundWriter(self.folder, self._on_rows) as writer:
            planned = self.job.plan.batch(batch)
            self._put(writer, planned, [Quarantined(request, reason) for request in planned.requests])

    def _late(self) -> int | None:
        """A batch that another process has been making for far too long; the first to finish commits equal bytes."""
        if not self.count:
            return None
        return self.queue.help(self.owner, max(LEAST_LATE_SECONDS, LATE_FACTOR * self.seconds / self.count))

    def _make(self, batches: Iterable[int]) -> None:
        plan = self.job.plan
        with BackgroundWriter(self.folder, self._on_rows) as writer:
            for batch, results in make_samples(self.job, (plan.batch(k) for k in batches), self._beat):
                self.count += 1
                if self._is_doubtful(batch.index, results):
                    self.queue.give_back(batch.index, self.owner, NOT_FINITE)
                else:
                    self.gate.evaluate(results)
                    self._put(writer, batch, results)
                if self.gate.is_closed:
                    break
        self.gate.check()

    def _put(self, writer: BackgroundWriter, batch: Batch, results: list[Sample | Quarantined]) -> None:
        if missing := self._missing(batch.index, results):
            writer.put(missing, batch_facts(self.job.recipe, batch))
        else:
            self._finish(batch.index)

    def _on_rows(self, rows: list[Row]) -> None:
        self._beat()
        if self._finish(rows[0].request.index // self.job.plan.batch_size):
            self.made += len(rows)
            self.on_commit(sum(row.status != DOUBTFUL for row in rows))

    def _finish(self, batch: int) -> bool:
        return self.queue.finish(batch, self._more) if self.job.replaces_quarantined else self.queue.finish(batch)

    def _more(self) -> list[int]:
        return batches_of(Quota(self.job, self.folder.ledger).missing(), self.job.plan.batch_size)

    def _missing(self, batch: int, results: list[Sample | Quarantined]) -> list[Sample | Quarantined]:
        """The results of samples that are missing in the run."""
        size, ledger = self.job.plan.batch_size, self.folder.ledger
        first, stop = batch * size, (batch + 1) * size
        if self.job.replaces_quarantined:
            return Quota(self.job, ledger, first, stop).take(results)
        if self.counts_by_class:  # a batch holds samples of classes that have enough
            wants = Quota(self.job, ledger, first, stop).wants
            results = [result for result in results if wants(result.request.index)]
        missing = set(range(first, min(stop, self.queue.last() + 1))) - ledger.indices_between(first, stop)
        return [result for result in results if result.request.index in missing]

    def _is_doubtful(self, batch: int, results: list[Sample | Quarantined]) -> bool:
        """Whether this device may be why numbers are not finite: then another makes the batch, and that counts."""
        if not any(isinstance(result, Quarantined) for result in results):
            return False
        others = {owner.slot for owner in self.queue.owners()} - {self.owner.slot}
        return bool(others) and not set(self.queue.failures(batch, NOT_FINITE)) - {self.owner.slot}
