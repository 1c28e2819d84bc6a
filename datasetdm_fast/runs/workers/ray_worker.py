"""What runs on the machines of a Ray cluster: the queue of a run as an actor beside the driver, and the workers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from datasetdm_fast.runs.jobs.job import Job, build_job
from datasetdm_fast.runs.jobs.resume import merge_with_stored
from datasetdm_fast.runs.run_folder.object_store import PublishingFolder
from datasetdm_fast.runs.run_settings import RunSpec
from datasetdm_fast.runs.workers.queue import DIED, NOT_FINITE, Owner, WorkQueue
from datasetdm_fast.runs.workers.spawn import reporting
from datasetdm_fast.runs.workers.worker import Worker
from datasetdm_fast.version import __version__

SECONDS_BETWEEN_TRIES = 0.5  # to learn what the driver has found in the run folder


class Coordinator(WorkQueue):
    """The queue of a run on a cluster, in memory: whatever Ray can carry may be reported."""

    def __init__(self):
        super().__init__()
        self._session: Mapping[str, Any] | None = None
        self._required: Set[int] = frozenset()
        self._planner = ""  # the process that makes the plan
        self._reports: list[list[Any]] = []
        self._may_grow = False

    def open(
        self,
        batches: Sequence[int],
        required: Set[int],
        document: Mapping[str, Any],
        *,
        may_grow: bool = False,
    ) -> None:
        """What the driver has found in the run folder: what is missing, in which batches, and run.json. A queue that
        `may_grow` is complete once the driver has no batch to add.
        """
        self._may_grow, self._required = may_grow, required
        self.fill(batches, max(required, default=-1))
        self._session = document

    def is_complete(self) -> bool:
        return super().is_complete() and not self._may_grow

    def is_all_made(self) -> bool:
        """Whether all batches are made, and the driver is to say whether the run has come to need others."""
        return self._may_grow and super().is_complete()

    def grow(self, batches: Sequence[int], required: Set[int]) -> None:
        """Adds the batches of the samples that the run has come to want; without any it is complete."""
        with self.alone():
            self._may_grow, self._required = bool(batches), required
            if batches:
                self.execute("UPDATE session SET last = ?", max(required))
                self._add(batches)

    def required_indices(self, first: int, stop: int) -> set[int]:
        """The samples from `first` to before `stop` that were missing when the driver filled the queue."""
        return {index for index in range(first, stop) if index in self._required}

    def session(self) -> Mapping[str, Any] | None:
        """run.json; None before the run folder is open."""
        return self._session

    def is_planner(self, owner: Owner) -> bool:
        """Whether this process is to make the plan, which no other running process has begun; True once."""
        if self._planner in {known.name for known in self.owners()}:
            return False
        self._planner = owner.name
        return True

    def take(self, owner: Owner, *, is_fresh: bool = True) -> int | None:
        batch = super().take(owner, is_fresh=is_fresh)
        if batch is not None and self.failures(batch, DIED):
            self.report(owner.slot, "message", f"batch {batch} is retried, as the process that had it has ended")
        return batch

    def give_back(self, batch: int, owner: Owner, reason: str) -> None:
        if reason == NOT_FINITE:
            self.report(owner.slot, "message", f"batch {batch} has numbers that are not finite and is retried")
        super().give_back(batch, owner, reason)

    def report(self, slot: int, kind: str, *content: Any) -> None:
        self._reports.append([slot, kind, *content])

    def reports(self) -> list[list[Any]]:
        reports, self._reports = self._reports, []
        return reports


class RemoteQueue:
    """The queue behind an actor: what is called here is done there, and waited for."""

    def __init__(self, actor: Any):
        self._actor = actor

    def __getattr__(self, name: str) -> Callable[..., Any]:
        import ray

        method = getattr(self._actor, name)
        return lambda *arguments, **options: ray.get(method.remote(*arguments, **options))


@dataclass(frozen=True)
class RayWorkerSetup:
    """What a worker receives at its start."""

    spec: RunSpec
    store: str  # URL of the samples, empty where they are in the run folder
    document: Mapping[str, Any] | None  # run.json, where it is known
    describe: Callable[[Job], list[str]]
    on_start: Callable[[], None] | None  # called before anything else
    coordinator: Any
    folder: str = field(default_factory=os.getcwd)  # from where relative paths are meant


class RayWorker:
    """An actor that works through the queue."""

    def work(self, setup: RayWorkerSetup, owner: Owner) -> None:
        with suppress(OSError):  # a machine without that folder needs paths that are not relative to it
            os.chdir(setup.folder)
        if setup.on_start:
            setup.on_start()
        queue = RemoteQueue(setup.coordinator)
        queue.enter(owner)
        with reporting(queue, owner):
            job = build_job(setup.spec, setup.document)
            while (session := queue.session()) is None and not queue.is_over():
                if queue.is_planner(owner):
                    queue.report(owner.slot, "planned", replace(job, engine=None), __version__, setup.describe(job))
                time.sleep(SECONDS_BETWEEN_TRIES)
            if session is None:
                return
            queue.report(owner.slot, "ready", [])
            folder = PublishingFolder(
                setup.spec.folder,
                setup.store,
                session,
                queue.required_indices,
                partial(queue.report, owner.slot, "rows"),
            )
            Worker(merge_with_stored(job, session), folder, queue, owner, has_ledger=False).work()
