"""Processes of a run in shards on a Ray cluster: Ray places an actor a GPU or a machine, and restarts one that ends."""

from __future__ import annotations

import os
import socket
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasetdm_fast.engine.loading.checks import first_line
from datasetdm_fast.errors import Missing, Stop
from datasetdm_fast.runs.run_folder.shard_places import ShardPlace, is_url, shard_place
from datasetdm_fast.runs.run_settings import RunSpec, WorkerSettings
from datasetdm_fast.runs.workers.claims import free_claims
from datasetdm_fast.runs.workers.devices import Pool, pool_of
from datasetdm_fast.runs.workers.ray_connection import address_of, join_cluster
from datasetdm_fast.runs.workers.shard_worker import ShardRank, ShardWorker, files_of_shard, open_shards
from datasetdm_fast.runs.workers.worker import Callbacks
from datasetdm_fast.version import __version__

RETRIES = 2  # by Ray of an actor and a call; a machine may use them up before Ray knows it ended; another actor follows
MOST_ACTORS = 3  # in a row without a shard, after which a place stays empty
SECONDS_BETWEEN_POLLS = 0.25
ALL_ADDRESSES = "Ray listens on all addresses of this machine until the run ends, and obeys only who has its token"
SEE_LOGS = "See Ray's logs of its workers; the same command resumes the run."
INSTALL = "Install it on every machine of the cluster: pip install 'datasetdm-fast[ray]'"


def run_on_cluster(workers: WorkerSettings, spec: RunSpec, place: ShardPlace, callbacks: Callbacks) -> None:
    """Returns as run_ranks does; Ray is called in a thread, so that the main one receives a signal at any moment."""
    name = uuid.uuid4().hex
    with ThreadPoolExecutor(1, "ray") as thread:
        try:
            thread.submit(_run, workers, spec, place, callbacks, name).result()
        except Stop:
            if not callbacks.is_stopping():
                raise
        finally:  # Ray has ended the actors of this driver
            free_claims(place, name, files_of_shard, died=False)


def _run(workers: WorkerSettings, spec: RunSpec, place: ShardPlace, callbacks: Callbacks, name: str) -> None:
    with join_cluster(workers.cluster, workers.ranks, place.name):
        import ray

        if address_of(workers.cluster) is None:
            callbacks.on_message(ALL_ADDRESSES)
        pool = pool_of(workers, spec.engine.device, spec.engine.threads, list(_machines().values()))
        spec = replace(spec, engine=replace(spec.engine, threads=pool.threads))
        where = place.name if is_url(place.name) else str(Path(place.name).absolute())
        options = {"scheduling_strategy": "SPREAD", "max_restarts": RETRIES, "max_task_retries": RETRIES}
        worker = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus, **options)(RayWorker)
        seen: Mapping[str, Mapping[str, float]] = {}
        calls: dict[Any, tuple[Any, int, int]] = {}
        begun = committed = 0

        def begin(number: int, deaths: int = 0) -> None:
            rank = ShardRank(number, max(_count(pool, workers, seen), number + 1), name)
            actor = worker.remote(spec, where, rank, callbacks.on_start, __version__)
            calls[actor.make_next.remote()] = actor, number, deaths

        while not callbacks.is_stopping():
            machines = _machines()
            for machine in seen.keys() - machines:  # its actors may wait long for room, and others have it now
                callbacks.on_message("a machine has left the cluster: what it made is made again")
                free_claims(place, machine, files_of_shard, died=False)
            seen = machines
            while begun < _count(pool, workers, seen):
                begin(begun)
                begun += 1
            for call in ray.wait(list(calls), timeout=SECONDS_BETWEEN_POLLS)[0]:
                (actor, number, deaths), result = calls.pop(call), _read(call)
                if result is None:
                    return
                if isinstance(result, int):
                    committed += result
                    callbacks.on_commit(result)
                    calls[actor.make_next.remote()] = actor, number, 0
                    continue
                ray.kill(actor)  # as the next one needs its room
                if isinstance(result, str) and deaths + 1 < MOST_ACTORS:
                    callbacks.on_message(f"worker {number} ended again and again, it is replaced")
                    begin(number, deaths + 1)
                    continue
                stop = Missing(f"worker {number} {result}", SEE_LOGS) if isinstance(result, str) else result
                if not (isinstance(stop, Missing) and calls and (committed or deaths)):
                    raise stop
                callbacks.on_message(f"{stop.cause}; the others go on")


def _machines() -> dict[str, dict[str, float]]:
    """The resources of the machines of the cluster."""
    import ray

    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def _count(pool: Pool, workers: WorkerSettings, machines: Mapping[str, Mapping[str, float]]) -> int:
    """The actors that were asked for, or that the cluster has room for now."""
    if workers.ranks or workers.gpus.isdecimal():
        return pool.workers
    room = (int(each.get("GPU", 0)) if pool.gpus else each.get("CPU", 0) >= 1 for each in machines.values())
    return max(pool.workers, sum(room))


def _read(call: Any) -> int | Stop | str | None:
    """What a call returned, or how its actor ended."""
    import ray

    try:
        result: int | Stop | None = ray.get(call)
        return result
    except ray.exceptions.RayError as error:
        if "No module named 'datasetdm_fast'" in str(error):
            return Missing("a machine of the cluster has no datasetdm_fast", INSTALL)
        return f"ended ({first_line(error)})"


class RayWorker:
    """An actor that makes shards."""

    def __init__(self, *arguments: Any):
        self._shards, self._has_made = _make_shards(*arguments), False

    def make_next(self) -> int | Stop | None:
        """The samples of a shard that it has made, what it refuses, or None once nothing is missing."""
        try:
            made = next(self._shards, None)
        except Exception as error:
            traceback.print_exc()
            if self._has_made and (isinstance(error, Missing) or not isinstance(error, Stop)):
                os._exit(1)  # it has worked before, so Ray starts another process in its place
            return error if isinstance(error, Stop) else Missing(f"{socket.gethostname()}: {error!r}", SEE_LOGS)
        self._has_made = True
        return made


def _make_shards(
    spec: RunSpec, where: str, rank: ShardRank, on_start: Callable[[], None] | None, version: str
) -> Iterator[int]:
    import ray

    if on_start:
        on_start()
    if version != __version__:
        raise Missing(f"a machine of the cluster has datasetdm_fast {__version__}, the driver {version}", INSTALL)
    place, machine = shard_place(where), ray.get_runtime_context().get_node_id()
    rank = replace(rank, name=f"{rank.name} {machine}")
    yield from ShardWorker(open_shards(spec, place), place, rank, Callbacks()).work()
