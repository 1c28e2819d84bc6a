"""Processes of a run in shards on this machine: a GPU each, or a share of the cores. Each claims shards by itself, so
that one which ends is only started again.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasetdm_fast.bug_report import report_bug
from datasetdm_fast.errors import REFUSALS, GateFailed, Missing, Refused
from datasetdm_fast.runs.run_folder.document import MANIFEST
from datasetdm_fast.runs.run_folder.shard_places import ShardPlace, shard_place
from datasetdm_fast.runs.run_folder.shards import shard_size
from datasetdm_fast.runs.run_settings import RunSpec
from datasetdm_fast.runs.workers.devices import Place
from datasetdm_fast.runs.workers.shard_worker import ShardRank, work_on_shards
from datasetdm_fast.runs.workers.spawn import (
    MOST_DEATHS,
    WITH_PARENT,
    SpawnedProcess,
    end_with_parent,
    start_process,
)
from datasetdm_fast.runs.workers.worker import Callbacks

SECONDS_BETWEEN_POLLS = 0.5  # of processes and manifest
_BOOT = WITH_PARENT + "from datasetdm_fast.runs.workers.shard_ranks import enter; enter()"


@dataclass
class ShardProcess:
    """A rank and the process that fills it now."""

    process: SpawnedProcess
    deaths: int = 0  # since the last shard that was committed


def run_ranks(places: Sequence[Place], spec: RunSpec, place: str, callbacks: Callbacks) -> None:
    """Returns once no shard is missing, or when the run is to stop; shards that are not complete are lost then."""
    opened = shard_place(place)
    known = set(opened.names(MANIFEST))

    def begin(rank: int) -> SpawnedProcess:
        work = place, ShardRank(rank, len(places)), callbacks.on_start
        return start_process(_BOOT, places[rank], spec, work, stdout=subprocess.PIPE)

    ranks = [ShardProcess(begin(rank)) for rank in range(len(places))]
    try:
        while any(each.process.poll() is None for each in ranks) and not callbacks.is_stopping():
            time.sleep(SECONDS_BETWEEN_POLLS)
            known = _count_new(opened, spec, known, ranks, callbacks)
            for rank, each in enumerate(ranks):
                if each.process.poll():
                    each.deaths += 1
                    _raise_refusal(each, rank, place, callbacks)
                    each.process = begin(rank)
    finally:
        for each in ranks:
            each.process.kill()
    _count_new(opened, spec, known, ranks, callbacks)


def _count_new(
    place: ShardPlace, spec: RunSpec, known: set[str], ranks: Sequence[ShardProcess], callbacks: Callbacks
) -> set[str]:
    """The entries of the manifest, after the samples of new ones were counted."""
    names, size = set(place.names(MANIFEST)), shard_size(spec.identity)
    for name in names - known:
        first = int(name.removesuffix(".json")) * size
        callbacks.on_commit(min(size, spec.number - first))
        for each in ranks:
            each.deaths = 0
    return names


def _raise_refusal(each: ShardProcess, rank: int, place: str, callbacks: Callbacks) -> None:
    """Raises what a process that ended has refused; another one is said to be replaced, unless it died too often."""
    assert each.process.stdout is not None
    report = each.process.stdout.read()
    if report:
        name, cause, remedy = json.loads(report)
        if name != "Missing" or each.deaths == MOST_DEATHS:
            raise REFUSALS[name](cause, remedy)
    how = each.process.ending()
    if each.deaths == MOST_DEATHS:
        raise Missing(
            f"{place}: a process of the run ended {MOST_DEATHS} times in a row ({how})",
            "Fix that and run the same command again: it resumes.",
        )
    callbacks.on_message(f"rank {rank} {how}, it is replaced")


def enter() -> None:
    """One process of the run, from its start to its end; what it refuses is its standard output."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent alone decides
        signal.signal(number, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "w") as report:
        os.dup2(2, 1)
        spec, place, rank, on_start = pickle.load(sys.stdin.buffer)
        end_with_parent()
        if on_start:
            on_start()
        try:
            work_on_shards(spec, shard_place(place), rank, Callbacks(_describe_nothing))
        except (Refused, Missing, GateFailed) as stop:
            json.dump([type(stop).__name__, stop.cause, stop.remedy], report)
            report.flush()
            sys.exit(stop.exit_code)
        except Exception as error:
            sys.exit(report_bug(error))


def _describe_nothing(job: Any) -> list[str]:
    return []
