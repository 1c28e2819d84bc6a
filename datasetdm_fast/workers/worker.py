"""One process's share of a run that several processes make together: it takes batches from the queue, makes them and
reports them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from datasetdm_fast.data import Batch, Sample, SetAside
from datasetdm_fast.disk import sqlite
from datasetdm_fast.generation import driver, run
from datasetdm_fast.generation.job import Job, adopt
from datasetdm_fast.generation.overlap import BackgroundWriter
from datasetdm_fast.run_folder.document import read_document
from datasetdm_fast.run_folder.folder import RunFolder
from datasetdm_fast.run_folder.ledger import Row
from datasetdm_fast.workers.queue import DIED, MOST_FAILURES, NOT_FINITE, Leases, Owner

PAUSE = 0.2  # seconds between two looks for work where there is none
LATE = 2.0  # batches of one's own that another may take over one before it is made a second time
LEAST_LATE = 5.0  # seconds that are never late


def join(job: Job, queue: Leases, journal: str = sqlite.WRITE_AHEAD) -> tuple[Job, RunFolder]:
    """The job as the run folder has it and that folder, open for a member; the first process makes the folder and lays
    the queue.
    """
    with queue.alone():
        stored = read_document(job.folder)
        if stored is not None:
            job = adopt(job, stored)
        folder = RunFolder(job.folder, job.document, is_member=True, journal=journal)
        if queue.last is None:
            wanted = run.lacking(folder.ledger, job.plan.number, job.config.limit)
            queue.lay(run.in_order(wanted, job.plan.batch_size), max(wanted, default=-1))
    return job, folder


class Share:
    """The work of one process: `on_commit` hears of the samples it committed first, `idle` is called while it waits for
    others.
    """

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        queue: Leases,
        owner: Owner,
        *,
        pulse: Callable[[], None],
        on_commit: Callable[[int], None] = lambda count: None,
        is_stopping: Callable[[], bool] = lambda: False,
        idle: Callable[[], None] = lambda: None,
    ):
        self.job, self.folder, self.queue, self.owner = job, folder, queue, owner
        self.pulse, self.on_commit, self.is_stopping, self.idle = pulse, on_commit, is_stopping, idle
        self.seconds, self.count = 0.0, 0  # spent on batches, and how many these were
        self.seen: dict[tuple[int, str], float] = {}  # since when others have been seen with a batch

    def work(self) -> None:
        """Makes batches until none is left, or until it is to stop."""
        while not self.is_stopping():
            begin = time.monotonic()
            if (batch := self.queue.take(self.owner)) is not None:
                self._make(chain([batch], self._fresh()))
                self.seconds += time.monotonic() - begin
                continue
            if self._retry():
                continue
            if self.queue.is_over:
                return
            self.pulse()
            self.idle()
            if (late := self._late()) is not None:
                self._make([late])
            else:
                time.sleep(PAUSE)

    def _fresh(self) -> Iterator[int]:
        """Batches nobody has failed, until there is none or it is time to stop."""
        while not self.is_stopping() and (batch := self.queue.take(self.owner)) is not None:
            yield batch

    def _retry(self) -> bool:
        """Whether there was a batch that was failed before; it is made with nothing beside it, so that another failure
        has one reason.
        """
        batch = self.queue.take(self.owner, is_fresh=False)
        if batch is None:
            return False
        if len(self.queue.failures(batch, DIED)) < MOST_FAILURES:
            self._make([batch])
            return True
        reason = f"{MOST_FAILURES} processes ended while they made its batch"
        with BackgroundWriter(self.folder, self._committed) as writing:
            made = self.job.plan.batch(batch)
            self._put(writing, made, [SetAside(request, reason) for request in made.requests])
        return True

    def _late(self) -> int | None:
        """A batch another has been busy with for far too long, which this process may now make as well: whoever is
        first commits the same bytes.
        """
        now = time.monotonic()
        held = [one for one in self.queue.held() if one.owner != self.owner.name]
        self.seen = {(one.batch, one.owner): self.seen.get((one.batch, one.owner), now) for one in held}
        if not self.count:
            return None
        patience = max(LEAST_LATE, LATE * self.seconds / self.count)
        late = [one.batch for one in held if one.helper is None and now - self.seen[one.batch, one.owner] > patience]
        return next((batch for batch in late if self.queue.help(batch, self.owner)), None)

    def _make(self, batches: Iterable[int]) -> None:
        plan = self.job.plan
        with BackgroundWriter(self.folder, self._committed) as writing:
            wanted = (plan.batch(k) for k in batches if self._is_wanted(k))
            for batch, results in driver.generate(wanted, self.job.engine, self.job.recipe, self.pulse):
                self.count += 1
                if self._is_doubtful(batch.index, results):
                    self.queue.give_back(batch.index, self.owner, NOT_FINITE)
                elif not self.queue.is_done(batch.index):
                    self._put(writing, batch, results)

    def _put(self, writing: BackgroundWriter, batch: Batch, results: list[Sample | SetAside]) -> None:
        lacking = self._lacking(batch.index)
        if kept := [result for result in results if result.request.index in lacking]:
            writing.put(kept, run.facts_of(self.job.recipe, batch))
        else:
            self.queue.finish(batch.index)

    def _committed(self, rows: list[Row]) -> None:
        self.pulse()
        if self.queue.finish(rows[0].request.index // self.job.plan.batch_size):
            self.on_commit(len(rows))

    def _is_wanted(self, batch: int) -> bool:
        """False for a batch that was committed by a process that ended before it could say so."""
        if self._lacking(batch):
            return True
        self.queue.finish(batch)
        return False

    def _lacking(self, batch: int) -> set[int]:
        size = self.job.plan.batch_size
        first, stop = batch * size, min((batch + 1) * size, self.job.plan.number, self.queue.last + 1)
        return set(range(first, stop)) - self.folder.ledger.within(first, stop)

    def _is_doubtful(self, batch: int, results: list[Sample | SetAside]) -> bool:
        """Whether numbers that are not finite may come from this process's device: then another one is to make the
        batch, and its word counts.
        """
        if not any(isinstance(result, SetAside) for result in results):
            return False
        others = self.queue.slots() - {self.owner.slot}
        return bool(others) and not set(self.queue.failures(batch, NOT_FINITE)) - {self.owner.slot}
