"""What runs on the machines of a Ray cluster: the queue of a run as an actor beside the driver, and the workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from datasetdm_fast.command_line.ending import report
from datasetdm_fast.config import RunConfig
from datasetdm_fast.data import Sample, SetAside
from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.generation.job import Job, adopt, compose
from datasetdm_fast.generation.prompts import PromptSource
from datasetdm_fast.run_folder import object_store
from datasetdm_fast.run_folder.folder import Publish, write_samples
from datasetdm_fast.run_folder.ledger import Row
from datasetdm_fast.version import __version__
from datasetdm_fast.workers.heartbeat import MOST_DEATHS
from datasetdm_fast.workers.queue import DIED, NOT_FINITE, Owner, SqliteQueue
from datasetdm_fast.workers.worker import Worker


class Failures(NamedTuple):
    """What is known of batches that failed, which outlives a queue."""

    devices: tuple[str, ...] = ()  # those of the slots
    found: tuple[tuple[int, int, str], ...] = ()  # batch, slot and reason of each


class Coordinator(SqliteQueue):
    """The queue of a run on a cluster, in memory; it also collects the rows, which the driver commits."""

    def __init__(self, batches: Sequence[int], last: int, places: int, most: int, failures: Failures):
        super().__init__()
        self._most, self._devices, self._is_stopping, self._starts = most, list(failures.devices), False, 0
        self._refusal: tuple[str, str, str] | None = None  # its kind, cause and remedy
        self._rows: list[Row] = []
        self._lines: list[str] = []
        self.fill(batches, last)
        self.expect(range(places))
        self.execute_many("INSERT INTO failures VALUES (?, ?, ?)", failures.found)

    def admit(self, device: str) -> int:
        """The slot of a device a worker starts on; refused where too many have started since a batch was finished."""
        self._starts += 1
        if self._starts > self._most * MOST_DEATHS:
            raise RuntimeError(f"{self._starts} processes have started, and none has made a batch")
        if device not in self._devices:
            self._devices.append(device)
        slot = self._devices.index(device)
        self.expect([slot])
        return slot

    def enter(self, owner: Owner) -> None:
        """Adds a worker in the place of the one its actor was before Ray restarted it."""
        for earlier in self.owners():
            if earlier.host == owner.host and earlier.name != owner.name:
                self.leave(earlier, DIED)
        super().enter(owner)

    def take(self, owner: Owner, *, is_fresh: bool = True) -> int | None:
        batch = None if self._is_stopping else super().take(owner, is_fresh=is_fresh)
        if batch is not None and self.failures(batch, DIED):
            self._lines.append(f"batch {batch} is begun again, the process that had it has ended")
        return batch

    def give_back(self, batch: int, owner: Owner, reason: str) -> None:
        if reason == NOT_FINITE:
            self._lines.append(f"batch {batch} has numbers that are not finite, it is made again")
        super().give_back(batch, owner, reason)

    def finish(self, batch: int) -> bool:
        self._starts = 0
        return super().finish(batch)

    def is_over(self) -> bool:
        return self._is_stopping or super().is_over()

    def commit(self, rows: Sequence[Row]) -> None:
        self._rows.extend(rows)

    def refuse(self, kind: str, cause: str, remedy: str) -> None:
        self._refusal = self._refusal or (kind, cause, remedy)

    def refusal(self) -> tuple[str, str, str] | None:
        return self._refusal

    def stop(self) -> None:
        """Nothing more is to be begun."""
        self._is_stopping = True

    def collect(self) -> tuple[list[Row], list[str]]:
        """Rows of samples whose files are published, and lines for the screen, each once."""
        found, self._rows, self._lines = (self._rows, self._lines), [], []
        return found

    def all_failures(self) -> Failures:
        found = self.execute("SELECT batch, slot, reason FROM failures")
        return Failures(tuple(self._devices), tuple(found))


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

    config: RunConfig
    source: PromptSource
    document: Mapping[str, Any] | None  # run.json, where it is known
    on_start: Callable[[], None] | None  # called before anything else
    coordinator: Any = None
    last: int = -1  # the last sample that is wanted
    present: frozenset[int] = frozenset()  # samples of the batches that are there already
    folder: str = field(default_factory=os.getcwd)  # from where relative paths are meant

    def begin(self) -> None:
        """To be called first of all on the worker's machine."""
        with suppress(OSError):  # a machine without that folder needs paths that are not relative to it
            os.chdir(self.folder)
        if self.on_start:
            self.on_start()


@dataclass(frozen=True)
class PublishingFolder:
    """The run folder as a worker sees it: it publishes the files of samples, and the driver commits their rows."""

    image_format: str
    publish: Publish
    present: frozenset[int]
    queue: Coordinator | RemoteQueue

    @property
    def ledger(self) -> PublishingFolder:
        return self

    def unseal(self) -> None:
        """The driver has done so."""

    def write(self, results: Sequence[Sample | SetAside], recipe: Mapping[str, Any]) -> list[Row]:
        return write_samples(results, recipe, self.image_format, self.publish)

    def within(self, first: int, stop: int) -> set[int]:
        return self.present.intersection(range(first, stop))

    def commit(self, rows: list[Row]) -> None:
        self.queue.commit(rows)


class RayWorker:
    """An actor of the pool; each call of it works until the queue is over."""

    def __init__(self, setup: RayWorkerSetup):
        import ray

        setup.begin()
        self.setup, self.queue, here = setup, RemoteQueue(setup.coordinator), ray.get_runtime_context()
        device = "/".join([here.get_node_id(), *here.get_accelerator_ids().get("GPU", ())])
        actor, process = here.get_actor_id(), os.getpid()
        self.owner = Owner(f"actor {actor}, process {process}", self.queue.admit(device), actor, process)
        self.queue.enter(self.owner)
        with self._refusing():
            self.job = adopt(compose(setup.config, setup.source, setup.document), setup.document)
            self.publish = object_store.publisher(setup.config)

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        folder = PublishingFolder(self.setup.config.image_format, self.publish, self.setup.present, self.queue)
        try:
            with self._refusing():
                Worker(self.job, folder, self.queue, self.owner, self.setup.last).work()
        except (Refused, Missing, GateFailed):
            raise
        except Exception as error:
            report(error)
            # a CUDA context that has failed once never works again: the process ends, and Ray starts another
            os._exit(1)
        return block

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Tells the driver what is refused within the block."""
        try:
            yield
        except (Refused, Missing, GateFailed) as stop:
            self.queue.refuse(type(stop).__name__, stop.cause, stop.remedy)
            raise


def plan(setup: RayWorkerSetup, describe: Callable[[Job], list[str]]) -> tuple:
    """The job as a machine of the cluster has it, with lines about it and our version there; a refusal comes back as
    its kind, cause and remedy.
    """
    setup.begin()
    try:
        job = compose(setup.config, setup.source, setup.document)
        return "ready", replace(job, engine=None), describe(job), __version__
    except (Refused, Missing, GateFailed) as stop:
        return "refused", type(stop).__name__, stop.cause, stop.remedy
