"""Processes that torchrun or Slurm has started: each is a rank of one run in a folder they share, and none is above the
others.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from datasetdm_fast.config import RunConfig
from datasetdm_fast.disk import locks, sqlite, storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.generation.job import prepare
from datasetdm_fast.generation.result import Result, close, look
from datasetdm_fast.generation.settings import count_images
from datasetdm_fast.run_folder import seal
from datasetdm_fast.run_folder.document import LOCK
from datasetdm_fast.run_folder.folder import clean
from datasetdm_fast.workers.devices import share_of_cores, visible_gpus
from datasetdm_fast.workers.heartbeat import QueueMonitor, born
from datasetdm_fast.workers.queue import Owner, SqliteQueue
from datasetdm_fast.workers.worker import Callbacks, Worker, join

ENTRY_SECONDS = 60.0  # another process may hold the folder while this one wants to enter
SECONDS_BETWEEN_TRIES = 0.2


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


def this_peer(environment: Mapping[str, str] = os.environ) -> LaunchedProcess | None:
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


def settle_on(config: RunConfig, peer: LaunchedProcess) -> RunConfig:
    """The configuration for this peer's share of its machine: a GPU of its own where there are GPUs, and its part of
    the cores.
    """
    for name in ("gpus", "ranks"):
        if getattr(config, name):
            raise Refused(
                f"--{name} {getattr(config, name)}: this is one of {peer.world} processes that were started together",
                "Drop the flag.",
            )
    gpus = visible_gpus() if config.device in ("auto", "cuda") else []
    if len(gpus) > 1:  # where there is one, whatever started the process has chosen it
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[peer.local_rank % len(gpus)]
    return replace(config, threads=config.threads or share_of_cores(peer.local_world))


def run(config: RunConfig, peer: LaunchedProcess, callbacks: Callbacks) -> Result:
    """This process's share of the run; returns once the whole run is committed, whoever made it."""
    folder, begin, host, committed = Path(config.out), time.perf_counter(), socket.gethostname(), []

    def count(samples: int) -> None:
        committed.append(samples)
        callbacks.on_commit(samples)

    journal = sqlite.IN_PLACE if peer.is_on_several_machines else sqlite.WRITE_AHEAD
    storage.make_folder(folder / "state")
    with present(folder):
        job, process = prepare(config), os.getpid()
        owner = Owner(f"rank {peer.rank} on {host}, process {process}", peer.rank, host, process, born(process))
        with closing(SqliteQueue(folder / seal.QUEUE)) as queue:
            queue.expect(range(peer.world))
            job, opened = join(job, queue, journal)
            for line in callbacks.describe(job):
                callbacks.on_message(line)
            monitor, is_stopping = QueueMonitor(queue, callbacks.patience, owner), callbacks.is_stopping
            with opened:
                Worker(job, opened, queue, owner, queue.last, count, monitor.look, is_stopping).work()
    is_waiting = peer.rank == 0 and not callbacks.is_stopping()
    return leave(folder, count_images(config), sum(committed), time.perf_counter() - begin, is_waiting=is_waiting)


@contextmanager
def present(folder: Path) -> Iterator[None]:
    """Holds the folder together with the other peers; the first of them finds it as the last run left it, and cleans
    it.
    """
    end = time.monotonic() + ENTRY_SECONDS
    with ExitStack() as held:
        while True:
            try:
                with locks.locked(folder / LOCK):
                    clean(folder)
                    SqliteQueue(folder / seal.QUEUE).close()  # two that made it at once would each have their own
            except Refused:
                pass  # others are there already, or one of them is just looking
            try:
                held.enter_context(locks.locked(folder / LOCK, is_shared=True))
                break
            except Refused:
                if time.monotonic() > end:
                    raise
                time.sleep(SECONDS_BETWEEN_TRIES)
        yield


def leave(folder: Path, number: int, made: int, seconds: float, *, is_waiting: bool) -> Result:
    """The result as this process sees it; the last to leave rebuilds the index files, and one that `is_waiting` leaves
    after the others.
    """
    end = time.monotonic() + ENTRY_SECONDS
    while True:
        try:
            with locks.locked(folder / LOCK):
                clean(folder)
                return close(folder, number, made, seconds)
        except Refused:
            if not is_waiting or time.monotonic() > end:
                return look(folder, number, made, seconds)
            time.sleep(SECONDS_BETWEEN_TRIES)
