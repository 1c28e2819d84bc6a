"""The work of one of the processes of a run folder: it claims batches that are missing, makes and commits them."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from datasetdm_fast.data import Quarantined, Sample
from datasetdm_fast.disk import sqlite, storage
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.jobs.run import merge_with_stored, prepare_job
from datasetdm_fast.runs.jobs.writing import BackgroundWriter, DomainGate, Quota, batch_facts, make_samples
from datasetdm_fast.runs.run_folder.document import CLAIMS, read_document
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.ledger import DOUBTFUL, Row
from datasetdm_fast.runs.run_folder.shard_places import ShardFolder
from datasetdm_fast.runs.run_settings import RunSpec
from datasetdm_fast.runs.workers.claims import Claims

MOST_DEATHS = 3  # of processes while they made a batch, after which it is quarantined
SECONDS_BETWEEN_TRIES = 0.2  # to claim a batch where all that are missing are claimed
LAST = f"{CLAIMS}/last"  # the last sample of a run with a limit
LOCK, ENTRY_SECONDS = f"{CLAIMS}/lock", 900.0  # one process enters the folder at a time


@dataclass(frozen=True)
class Callbacks:
    """How the processes of a run and the command that starts them reach each other."""

    describe: Callable[[Job], list[str]] | None = None  # lines about a job, for the screen
    on_message: Callable[[str], None] = lambda line: None  # with every line for the screen
    on_commit: Callable[[int], None] = lambda count: None  # with the samples of every commit
    is_stopping: Callable[[], bool] = lambda: False  # asked between two batches
    on_start: Callable[[], None] | None = None  # called by every process before anything else
    patience: float = 1800.0  # seconds without a sign of life after which a process at work is taken to hang


def work_on_folder(spec: RunSpec, callbacks: Callbacks, name: str = "", journal: str = sqlite.WRITE_AHEAD) -> int:
    """The samples that this process has made, once none is missing or it was to stop; others may work there, too."""
    job, place = prepare_job(spec, read_document(spec.folder)), ShardFolder(spec.folder / "state")
    storage.make_folder(place.path / CLAIMS)
    with storage.hold_lock(place.path / LOCK, patience=ENTRY_SECONDS):
        if (stored := read_document(job.folder)) is not None:
            job = merge_with_stored(job, stored)
        folder = RunFolder(job.folder, job.document, is_member=True, journal=journal)
        if job.limit and place.read(LAST) is None:
            place.create(LAST, str(max(Quota(job, folder.ledger).missing(), default=-1)).encode())
    with folder:
        for line in callbacks.describe(job) if callbacks.describe else ():
            callbacks.on_message(line)
        last = int(place.read(LAST) or b"-1") if job.limit else job.plan.most
        worker = Worker(job, folder, Claims(place, name), last, callbacks)
        worker.work()
    return worker.made


class Worker:
    """Makes missing batches up to the sample `last`."""

    def __init__(self, job: Job, folder: RunFolder, claims: Claims, last: int, callbacks: Callbacks):
        self.job, self.folder, self.claims, self.last, self.callbacks = job, folder, claims, last, callbacks
        self.gate, self.made = DomainGate(job, folder.ledger), 0

    def work(self) -> None:
        """Makes batches until none is missing, or until it is to stop."""
        while missing := self._missing():
            while missing:
                if self.callbacks.is_stopping():
                    return
                if not (self._make(self._claim_new(missing)) or self._retry(missing)):
                    time.sleep(SECONDS_BETWEEN_TRIES)
                missing = {batch: indices for batch, indices in missing.items() if self._is_missing(batch, indices)}

    def _missing(self) -> dict[int, set[int]]:
        """The batches with samples to be made, as far as is known now, and these samples."""
        batches: dict[int, set[int]] = {}
        for index in Quota(self.job, self.folder.ledger).missing():
            if index <= self.last:
                batches.setdefault(index // self.job.plan.batch_size, set()).add(index)
        return batches

    def _is_missing(self, batch: int, indices: set[int]) -> bool:
        """Whether some of these samples of a batch are still missing."""
        return not indices <= self.folder.ledger.indices_between(*self._range(batch))

    def _range(self, batch: int) -> tuple[int, int]:
        size = self.job.plan.batch_size
        return batch * size, (batch + 1) * size

    def _claim_new(self, missing: dict[int, set[int]]) -> Iterator[int]:
        """Batches that no process has begun, until there is none or it is time to stop."""
        for batch, indices in missing.items():
            if self.callbacks.is_stopping():
                return
            if self._is_missing(batch, indices) and self.claims.take_new(batch):
                if self._is_missing(batch, indices):
                    yield batch
                else:  # others have made it before it was claimed
                    self.claims.release(batch)

    def _retry(self, missing: dict[int, set[int]]) -> bool:
        """Whether a batch was taken over from a process that ended: it is made alone, so that another death has one
        reason, or quarantined.
        """
        for batch, indices in missing.items():
            if self._is_missing(batch, indices) and self.claims.take(batch):
                if not self._is_missing(batch, indices):  # others have made it before it was claimed
                    self.claims.release(batch)
                    continue
                if self.claims.deaths[batch] < MOST_DEATHS:
                    return self._make([batch])
                reason = f"{MOST_DEATHS} processes ended while they made its batch"
                requests = self.job.plan.batch(batch).requests
                with BackgroundWriter(self.folder, self._on_rows) as writer:
                    self._put(writer, batch, [Quarantined(request, reason) for request in requests])
                return True
        return False

    def _make(self, batches: Iterable[int]) -> bool:
        """Whether there were any batches to be made."""
        count, plan = 0, self.job.plan
        with BackgroundWriter(self.folder, self._on_rows) as writer:
            for batch, results in make_samples(self.job, (plan.batch(k) for k in batches), self.claims.renew):
                count += 1
                self.gate.evaluate(results)
                self._put(writer, batch.index, results)
                if self.gate.is_closed:
                    break
        self.gate.check()
        return count > 0

    def _put(self, writer: BackgroundWriter, batch: int, results: list[Sample | Quarantined]) -> None:
        """Hands over the results that are missing in the run, of a batch that another process may have made as well."""
        taken = Quota(self.job, self.folder.ledger, *self._range(batch)).take(results)
        if taken := [result for result in taken if result.request.index <= self.last]:
            writer.put(taken, batch_facts(self.job.recipe, self.job.plan.batch(batch)))
        else:
            self.claims.release(batch)

    def _on_rows(self, rows: list[Row]) -> None:
        self.made += len(rows)
        self.callbacks.on_commit(sum(row.status != DOUBTFUL for row in rows))
        self.claims.release(rows[0].request.index // self.job.plan.batch_size)
