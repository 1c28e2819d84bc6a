"""What runs inside a Ray worker."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from datasetdm_fast.command_line.ending import report
from datasetdm_fast.config import RunConfig
from datasetdm_fast.data import Batch, Sample, SetAside
from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.generation import driver, run
from datasetdm_fast.generation.job import Job, adopt, compose
from datasetdm_fast.generation.prompts import PromptSource
from datasetdm_fast.run_folder import object_store
from datasetdm_fast.run_folder.folder import write_samples
from datasetdm_fast.run_folder.ledger import Row
from datasetdm_fast.version import __version__
from datasetdm_fast.workers.heartbeat import BEAT, MOST_DEATHS
from datasetdm_fast.workers.queue import MOST_FAILURES

MOST_ROUNDS = 3  # without a single commit, after which the run ends
ENDED = f"{MOST_FAILURES} processes ended while they made its batch"


@dataclass(frozen=True)
class WorkOrder:
    """What a worker hears when it is about to make a batch."""

    deaths: int  # of processes that had begun it
    is_stopping: bool


@dataclass
class Coordinator:
    """The one place all workers report to; it runs beside the driver and computes nothing."""

    deaths: dict[int, int] = field(default_factory=dict)  # batch -> processes that began it and have not ended it
    doubts: dict[int, list[str]] = field(default_factory=dict)  # batch -> places where its numbers were not finite
    starts: int = 0  # of workers, since a batch was last ended
    beats: int = 0
    is_stopping: bool = False
    refusal: tuple[str, str, str] | None = None  # its kind, cause and remedy
    lines: list[str] = field(default_factory=list)

    def enter(self) -> int:
        self.starts += 1
        return self.starts

    def begin(self, batch: int, is_alone: bool) -> WorkOrder:
        """Whether and how to make the batch; one that was begun before is only begun again with nothing beside it."""
        deaths = self.deaths.get(batch, 0)
        if not self.is_stopping and (is_alone or not deaths):
            self.deaths[batch] = deaths + 1
            if deaths:
                self.lines.append(f"batch {batch} is begun again, the process that had it has ended")
        self.beats += 1
        return WorkOrder(deaths, self.is_stopping)

    def end(self, batch: int) -> None:
        self.deaths.pop(batch, None)
        self.starts = 0
        self.beats += 1

    def doubt(self, batch: int, place: str) -> bool:
        """Whether numbers that are not finite may be the fault of a place, so that another one is to make the batch, in
        the next round.
        """
        before = self.doubts.setdefault(batch, [])
        if set(before) - {place} or len(before) == MOST_ROUNDS - 1:
            return False
        before.append(place)
        self.lines.append(f"batch {batch} has numbers that are not finite, it is made again")
        return True

    def beat(self) -> None:
        self.beats += 1

    def refuse(self, kind: str, cause: str, remedy: str) -> None:
        self.refusal = self.refusal or (kind, cause, remedy)

    def stop(self) -> None:
        self.is_stopping = True

    def told(self) -> Told:
        lines, self.lines = self.lines, []
        return Told(self.beats, lines, self.refusal, self.deaths, self.doubts)


class Told(NamedTuple):
    """What the driver hears."""

    beats: int  # signs of life so far
    lines: list[str]  # for the screen, since it last asked
    refusal: tuple[str, str, str] | None  # why a worker cannot go on
    deaths: dict[int, int]
    doubts: dict[int, list[str]]


@dataclass(frozen=True)
class RayWorkerSetup:
    """What a worker is told at its start."""

    config: RunConfig
    source: PromptSource
    most: int  # workers there may be
    places: int  # devices, or machines without one, that they are on
    desk: Any
    document: Mapping[str, Any] | None = None  # run.json, once it is known
    first: Callable[[], None] | None = None  # called before anything else
    where: str = field(default_factory=os.getcwd)  # from where relative paths are meant

    def begin(self) -> None:
        """To be called first of all on the worker's machine."""
        with suppress(OSError):  # a machine without that folder needs paths that are not relative to it
            os.chdir(self.where)
        if self.first:
            self.first()


class Worker:
    """An actor of the pool: it makes the batches of a block, publishes their files and returns their rows."""

    def __init__(self, setup: RayWorkerSetup):
        import ray

        setup.begin()
        self.desk, self.beaten, self.places = setup.desk, 0.0, setup.places
        here = ray.get_runtime_context()
        self.place = "/".join([here.get_node_id(), *here.get_accelerator_ids().get("GPU", ())])
        starts = ray.get(self.desk.enter.remote())
        if starts > setup.most * MOST_DEATHS:
            raise RuntimeError(f"{starts} processes have started, and none has made a batch")
        try:
            self.job = adopt(compose(setup.config, setup.source, setup.document), setup.document)
            self.publish = object_store.publisher(setup.config)
        except (Refused, Missing, GateFailed) as stop:
            self._refuse(stop)
            raise

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        rows: list[Row] = []
        try:
            wanted = {
                int(batch): {int(index) for index in indices}
                for batch, indices in zip(block["batch"], block["wanted"], strict=True)
            }
            for batch, results in self._results(list(wanted)):
                kept = (
                    []
                    if self._is_doubtful(batch.index, results)
                    else [result for result in results if result.request.index in wanted[batch.index]]
                )
                rows += write_samples(
                    kept, run.facts_of(self.job.recipe, batch), self.job.config.image_format, self.publish
                )
                self.desk.end.remote(batch.index)
        except (Refused, Missing, GateFailed) as stop:
            self._refuse(stop)
            raise
        except (
            Exception
        ) as error:  # a CUDA context that has failed once never works again: the process ends, and Ray starts another
            report(error)
            os._exit(1)
        found = np.empty(1, object)
        found[0] = rows
        return {"rows": found}

    def _results(self, batches: Sequence[int]) -> Iterator[tuple[Batch, list[Sample | SetAside]]]:
        """Batches nobody has failed together, the others one by one, so that another failure has one reason."""
        plan, engine, recipe, begun_before = self.job.plan, self.job.engine, self.job.recipe, []

        def fresh() -> Iterator[Batch]:
            for batch in batches:
                order = self._begin(batch)
                if order.is_stopping:
                    return
                if order.deaths:
                    begun_before.append(batch)
                else:
                    yield plan.batch(batch)

        yield from driver.generate(fresh(), engine, recipe, self._pulse)
        for number in begun_before:
            batch, order = plan.batch(number), self._begin(number, is_alone=True)
            if order.is_stopping:
                return
            if order.deaths >= MOST_FAILURES:
                yield batch, [SetAside(request, ENDED) for request in batch.requests]
            else:
                yield from driver.generate([batch], engine, recipe, self._pulse)

    def _is_doubtful(self, batch: int, results: Sequence[Sample | SetAside]) -> bool:
        is_whole = not any(isinstance(result, SetAside) and result.reason != ENDED for result in results)
        return not is_whole and self.places > 1 and self._doubt(batch)

    def _doubt(self, batch: int) -> bool:
        import ray

        return ray.get(self.desk.doubt.remote(batch, self.place))

    def _begin(self, batch: int, *, is_alone: bool = False) -> WorkOrder:
        import ray

        return ray.get(self.desk.begin.remote(batch, is_alone))

    def _pulse(self) -> None:
        now = time.monotonic()
        if now - self.beaten > BEAT:
            self.beaten = now
            self.desk.beat.remote()

    def _refuse(self, stop: Refused | Missing | GateFailed) -> None:
        import ray

        ray.get(self.desk.refuse.remote(type(stop).__name__, stop.cause, stop.remedy))


def plan(setup: RayWorkerSetup, stored: Mapping[str, Any] | None, describe: Callable[[Job], list[str]]) -> tuple:
    """The job as a machine of the cluster has it, with lines about it and our version there; a refusal comes back as
    what it says.
    """
    setup.begin()
    try:
        job = compose(setup.config, setup.source, stored)
        return "ready", replace(job, engine=None), describe(job), __version__
    except (Refused, Missing, GateFailed) as stop:
        return "refused", type(stop).__name__, stop.cause, stop.remedy
