"""generate --layout shards: what it refuses, the processes that make the shards, and what it prints."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from datasetdm_fast.command_line import run_report
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import CountProgress, ImageProgress, check_output, print_lines
from datasetdm_fast.command_line.run_settings import check_judged
from datasetdm_fast.config import EXACT
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.agreement.admission import Screen, admit_job
from datasetdm_fast.runs.jobs.job import Job, build_job
from datasetdm_fast.runs.jobs.run import tries_half
from datasetdm_fast.runs.jobs.writing import result_of
from datasetdm_fast.runs.run_folder.document import DOCUMENT, grows, pretty, shard_size
from datasetdm_fast.runs.run_folder.selections import read_dropped
from datasetdm_fast.runs.run_folder.shard_places import ShardBucket, ShardPlace, is_url, shard_place
from datasetdm_fast.runs.run_folder.shards import ShardLedger, list_shards, read_stored
from datasetdm_fast.runs.run_settings import RunConfig, RunSpec, WorkerSettings
from datasetdm_fast.runs.workers.claims import Claims
from datasetdm_fast.runs.workers.devices import LaunchedProcess, find_places, take_share
from datasetdm_fast.runs.workers.ray_ranks import run_on_cluster
from datasetdm_fast.runs.workers.shard_worker import (
    ShardRank,
    check_settings,
    files_of_shard,
    open_place,
    work_on_shards,
)
from datasetdm_fast.runs.workers.spawn import run_ranks
from datasetdm_fast.runs.workers.worker import Callbacks


def generate_shards(config: RunConfig, spec: RunSpec, peer: LaunchedProcess | None, resume_with: str) -> int:
    """The exit code of a run in shards."""
    where, workers, begin = config.store or config.out, config.group(WorkerSettings), time.perf_counter()
    spec = replace(spec, folder=Path(where), may_mix=False, url=where if is_url(where) else "")
    if peer and workers.cluster:
        started = f"this is one of {peer.world} processes that were started together"
        raise Refused(f"--cluster {config.cluster}: {started}", "Start one process alone.")
    if config.store and not config.dry_run:
        ShardBucket(config.store).require_bucket(is_made=config.make_bucket)
        if not is_url(config.store):
            check_output("--store", config.store, "folder")
    place, is_reporting = shard_place(where), not (peer and peer.rank)
    if (document := read_stored(place)) is not None:
        check_settings(spec, place, document)
    ledger = ShardLedger(place, shards=() if document is None else None, number=spec.number, counts_only=True)
    # a run is judged once, also one whose only shard is taken out as it grows
    spec = replace(spec, force_domain=spec.force_domain or bool(ledger.entries or ledger.short))
    if config.dry_run:
        return run_report.print_run_plan(config, replace(build_job(spec, document), done=ledger.made))
    if is_reporting:
        place.remove_parts(DOCUMENT)  # of processes that were killed while they wrote it
    is_complete = False
    if document is not None and not grows(document["config"], spec.identity):
        ledger.remove_short()
        is_complete = ledger.made >= spec.number
    config = replace(config, quiet=config.quiet or not is_reporting)
    interruption, made = Interruption(config.quiet), 0

    def on_commit(count: int) -> None:
        nonlocal made
        made += count
        progress.on_commit(count)

    places = [] if peer or workers.cluster else find_places(workers, spec.engine.device, spec.engine.threads)
    if peer or workers.cluster:
        check_judged(config, document is not None)
    elif document is None:
        _begin(config, spec, place)
    share = -(-max(spec.number - ledger.made, 0) // (peer.world if peer else 1))
    with interruption, ImageProgress(share, config.quiet) as progress:
        describe = partial(_describe_start, ledger.made)
        callbacks = Callbacks(describe, progress.print, on_commit, is_stopping=interruption.is_stopping)
        if is_complete:  # no network is loaded for it
            Claims(place, files_of=files_of_shard).release_left(list_shards(place))
        elif workers.cluster:
            run_on_cluster(workers, spec, place, callbacks)
        elif places:
            run_ranks(places, spec, ledger, callbacks)
        else:
            if peer:
                threads = take_share(peer, workers, spec.engine.device, spec.engine.threads)
                spec = replace(spec, engine=replace(spec.engine, threads=threads))
            rank = ShardRank(peer.rank, peer.world) if peer else ShardRank()
            work_on_shards(spec, place, rank, callbacks)
    if is_reporting:
        _report(config, spec, ledger, made, begin, resume_with)
    return interruption.exit_code


def _describe_start(done: int, job: Job) -> list[str]:
    """What a job is about to make where shards of so many samples are there."""
    return run_report.describe_start(replace(job, done=done))


def _begin(config: RunConfig, spec: RunSpec, place: ShardPlace) -> None:
    """Writes run.json where samples are to be judged first, with the verdict."""
    if config.verify or config.speed != EXACT or tries_half(spec, None):
        open_place(place)
        screen = Screen(partial(print_lines, config), partial(CountProgress, config.quiet))
        job = admit_job(spec, None, screen, verify=config.verify)
        place.create(DOCUMENT, pretty(job.document))


def _report(config: RunConfig, spec: RunSpec, ledger: ShardLedger, made: int, begin: float, resume_with: str) -> None:
    """Prints the result of the run, and fails where samples were quarantined."""
    place = ledger.place
    if (document := read_stored(place)) is None:
        return
    if dropped := read_dropped(place):  # whose rows tell which of them are doubtful
        ledger = ShardLedger(place, shard_size(document["config"]), number=spec.number, dropped=dropped)
    ledger.read_entries(list_shards(place))
    seconds = time.perf_counter() - begin
    result = result_of(place.name, document, spec.number, ledger, made, seconds=seconds)
    if result.is_complete and not made:
        run_report.print_finished_run(config, result)
    else:
        run_report.print_run(config, result, resume_with)
