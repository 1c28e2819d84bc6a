"""The ways to make the samples of a run folder: in this process, in spawned ones, or as one that was launched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from datasetdm_fast.runs.run_settings import RunSpec, WorkerSettings
from datasetdm_fast.runs.workers.devices import LaunchedProcess, find_places, take_share

if TYPE_CHECKING:
    from datasetdm_fast.runs.jobs.writing import Result
    from datasetdm_fast.runs.workers.worker import Callbacks


@dataclass(frozen=True)
class Launch:
    """One way to make the samples of a run."""

    run: Callable[[RunSpec, Callbacks], Result] | None = None  # None: this process makes them, and so needs the job
    processes: int = 1  # like this one, among which the samples are divided
    may_compare: bool = True  # whether this process may compare engines before the others start


def choose_launch(spec: RunSpec, workers: WorkerSettings, peer: LaunchedProcess | None) -> tuple[RunSpec, Launch]:
    """The way that the flags and the environment ask for, and the run with the threads that each process has."""
    device, threads = spec.engine.device, spec.engine.threads
    if peer:
        from datasetdm_fast.runs.workers.launched import run_launched

        threads = take_share(peer, workers, device, threads)
        spec = replace(spec, engine=replace(spec.engine, threads=threads))
        return spec, Launch(partial(run_launched, peer), peer.world, may_compare=False)
    if places := find_places(workers, device, threads):
        from datasetdm_fast.runs.workers.spawn import run_spawned

        return spec, Launch(partial(run_spawned, places))
    return spec, Launch()
