"""Processes that torchrun or Slurm has started: each is a rank of one run in a folder they share, and none is above the
others.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasetdm_fast.disk import locks, sqlite, storage
from datasetdm_fast.engine.engines.hardware import visible_gpus
from datasetdm_fast.errors import GateFailed, Refused
from datasetdm_fast.runs.jobs.job import Job, prepare_job
from datasetdm_fast.runs.jobs.result import Result, close_folder, read_result
from datasetdm_fast.runs.run_folder import seal
from datasetdm_fast.runs.run_folder.document import LOCK, read_document
from datasetdm_fast.runs.run_folder.folder import ENTRY_SECONDS, SECONDS_BETWEEN_TRIES, clean, shared
from datasetdm_fast.runs.run_settings import RunSpec, WorkerSettings
from datasetdm_fast.runs.workers.devices import share_of_cores
from datasetdm_fast.runs.workers.heartbeat import Silence, host, is_over
from datasetdm_fast.runs.workers.queue import DIED, Owner, WorkQueue
from datasetdm_fast.runs.workers.worker import Callbacks, Worker, join_run


@dataclass(frozen=True)
class LaunchedProcess:
    """This process among those of its run, as whatever started them counts."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @property
    def is_on_several_machines(self) -> bool:
        return self.local_world < self.world


def find_peer(environment: Mapping[str, str] = os.environ) -> LaunchedProcess | None:
    """This process as torchrun's variables, or those of a Slurm step, describe it; None where it was started alone."""
    for names in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        # A batch script has SLURM_PROCID and SLURM_NTASKS too, but is one process; only a step says how many tasks it
        # has.
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ):
        # tasks of several nodes are written 4(x2),3
        values = [re.match(r"\d+", environment.get(name, "")) for name in names]
        if all(values):
            peer = LaunchedProcess(*(int(value[0]) for value in values))
            return peer if peer.world > 1 else None
    return None


def take_share(peer: LaunchedProcess, workers: WorkerSettings, device: str, threads: int) -> int:
    """The threads of this peer, its part of the cores of its machine; where there are GPUs, it takes one of its own."""
    for name in ("gpus", "ranks"):
        if getattr(workers, name):
            raise Refused(
                f"--{name} {getattr(workers, name)}: this is one of {peer.world} processes that were started together",
                "Drop the flag.",
            )
    gpus = visible_gpus() if device in ("auto", "cuda") else []
    if len(gpus) > 1:  # where there is one, whatever started the process has chosen it
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[peer.local_rank % len(gpus)]
    return threads or share_of_cores(peer.local_world)


def run_launched(peer: LaunchedProcess, spec: RunSpec, job: Job | None, callbacks: Callbacks) -> Result:
    """This process's share of the run; returns once the whole run is committed, whoever made it."""
    folder, begin, here, process = spec.folder, time.perf_counter(), host(), os.getpid()
    owner = Owner(f"rank {peer.rank} on {here}, process {process}", peer.rank, here, process)
    journal = sqlite.IN_PLACE if peer.is_on_several_machines else sqlite.WRITE_AHEAD
    storage.make_folder(folder / "state")

    def expect_all() -> None:
        with closing(WorkQueue(folder / seal.QUEUE)) as queue:  # two who made it at once would each have one
            for slot in range(peer.world):
                queue.enter(Owner(f"rank {slot}", slot))

    with shared(folder, expect_all), closing(WorkQueue(folder / seal.QUEUE)) as queue:
        queue.enter(owner)
        job, opened = join_run(prepare_job(spec, read_document(folder)), queue, journal)
        for line in callbacks.describe(job):
            callbacks.on_message(line)
        watch = partial(drop_lost, queue, Silence(callbacks.patience), owner)
        compare = callbacks.compare and partial(callbacks.compare, on_message=callbacks.on_message)
        with opened:
            worker = Worker(
                job, opened, queue, owner, callbacks.on_commit, watch, callbacks.is_stopping, compare=compare
            )
            try:
                worker.work()
            except GateFailed:  # the others begin nothing more, either
                queue.stop()
                raise
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
    """The result as this process sees it; the last to leave rebuilds the index files, and one that `is_waiting` leaves
    after the others.
    """
    end = time.monotonic() + ENTRY_SECONDS
    while True:
        with ExitStack() as held:
            try:
                held.enter_context(locks.hold_lock(folder / LOCK))
            except Refused:  # others are there; what the closing refuses is no such thing
                if not is_waiting or time.monotonic() > end:
                    return read_result(folder, number, made, begin)
            else:
                clean(folder)
                return close_folder(folder, number, made, begin)
        time.sleep(SECONDS_BETWEEN_TRIES)
