"""Processes that torchrun or Slurm has started: ranks of one run in a folder they share, all alike."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from datasetdm_fast.disk import locks, sqlite, storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.jobs.job import Job
from datasetdm_fast.runs.jobs.result import Result, close_folder, read_result
from datasetdm_fast.runs.jobs.run import prepare_job
from datasetdm_fast.runs.run_folder import seal
from datasetdm_fast.runs.run_folder.document import LOCK, read_document
from datasetdm_fast.runs.run_folder.folder import ENTRY_SECONDS, SECONDS_BETWEEN_TRIES, clean, share_folder
from datasetdm_fast.runs.run_settings import RunSpec
from datasetdm_fast.runs.workers.devices import LaunchedProcess
from datasetdm_fast.runs.workers.heartbeat import Silence, host, is_over
from datasetdm_fast.runs.workers.queue import DIED, Owner, WorkQueue
from datasetdm_fast.runs.workers.worker import Callbacks, Worker, join_run


def run_launched(peer: LaunchedProcess, spec: RunSpec, job: Job | None, callbacks: Callbacks) -> Result:
    """This process's share of the run; returns once the whole run is committed, by this process and the others."""
    folder, begin, here, process = spec.folder, time.perf_counter(), host(), os.getpid()
    owner = Owner(f"rank {peer.rank} on {here}, process {process}", peer.rank, here, process)
    journal = sqlite.IN_PLACE if peer.is_on_several_machines else sqlite.WRITE_AHEAD
    storage.make_folder(folder / "state")

    def expect_all() -> None:
        with closing(WorkQueue(folder / seal.QUEUE)) as queue:  # two who made it at once would each have one
            for slot in range(peer.world):
                queue.enter(Owner(f"rank {slot}", slot))

    with share_folder(folder, expect_all), closing(WorkQueue(folder / seal.QUEUE)) as queue:
        queue.enter(owner)
        job, opened = join_run(prepare_job(spec, read_document(folder)), queue, journal)
        for line in callbacks.describe(job):
            callbacks.on_message(line)
        watch = partial(drop_lost, queue, Silence(callbacks.patience), owner)
        with opened:
            worker = Worker(job, opened, queue, owner, callbacks.on_commit, watch, callbacks.is_stopping)
            worker.work()
    is_waiting = peer.rank == 0 and not callbacks.is_stopping()
    return leave(folder, spec.number, worker.made, begin, is_waiting=is_waiting)


def drop_lost(queue: WorkQueue, silence: Silence, this: Owner) -> None:
    """Takes processes that have ended or hang out of the queue, so that their batches go to others."""
    owners = queue.owners()
    silent = silence.too_long(owners)
    for owner in owners:
        if owner != this and (owner in silent or is_over(owner)):
            queue.leave(owner, DIED)


def leave(folder: Path, number: int, made: int, begin: float, *, is_waiting: bool) -> Result:
    """The result; the last process to leave rebuilds the index files, and one that `is_waiting` is the last."""
    end = time.monotonic() + ENTRY_SECONDS
    while True:
        with ExitStack() as held:
            try:
                held.enter_context(locks.hold_lock(folder / LOCK))
            except Refused:  # others work there; a refusal of the closing is raised
                if not is_waiting or time.monotonic() > end:
                    return read_result(folder, number, made, begin)
            else:
                clean(folder)
                return close_folder(folder, number, made, begin)
        time.sleep(SECONDS_BETWEEN_TRIES)
