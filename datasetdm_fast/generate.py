"""python -m datasetdm_fast.generate: generate images and their labels from prompts; without any flag, the demo run."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasetdm_fast.command_line import run_report, run_settings
from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import CountProgress, ImageProgress, print_lines
from datasetdm_fast.command_line.run_settings import choose_launch
from datasetdm_fast.config import EXACT, HALF, UNDECODED
from datasetdm_fast.engine.engines import check_sources
from datasetdm_fast.runs.agreement.admission import Screen, admit_job
from datasetdm_fast.runs.jobs.run import count_rows, find_result, may_differ, prepare_job, tries_half
from datasetdm_fast.runs.jobs.writing import Result, count_outside, write_missing
from datasetdm_fast.runs.run_folder.document import SHARDS, read_document
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_settings import RunConfig, RunSpec, WorkerSettings
from datasetdm_fast.runs.workers.devices import LaunchedProcess, find_peer, find_places

EXAMPLES = (
    "--number 16",
    "--model MODEL --decoder decoder --task semantic,depth --prompts prompts.txt --out runs/rooms",
    "--only 00000003 --out runs/rooms",
)


@command_with(RunConfig, EXAMPLES)
def main(config: RunConfig, command: CommandLine) -> int:
    config = run_settings.complete_settings(config, command.provided)
    if config.only:
        return run_settings.remake_from(config, command.provided)
    peer = None if config.dry_run else find_peer()
    if config.layout == SHARDS:
        from datasetdm_fast.command_line.sharded_run import generate_shards

        return generate_shards(config, run_settings.read_spec(config), peer, command.text)
    spec, stored = run_settings.read_spec(config), read_document(Path(config.out))
    if peer:
        run_settings.check_judged(config, stored is not None)
    is_reporting = not (peer and peer.rank)
    result = find_result(spec, stored, is_alone=peer is None, is_dry=config.dry_run)
    config = replace(config, quiet=config.quiet or not is_reporting)
    interruption = Interruption(config.quiet)
    if result:
        return run_report.print_finished_run(config, result) if is_reporting else 0
    is_decoded = set(config.task) - set(UNDECODED)
    check_sources(config.model, config.decoder if is_decoded else None, config.allow_download)
    if sys.stderr.isatty():  # libraries and networks take seconds to load
        print_lines(config, f"loading    {config.model}")
    workers = config.group(WorkerSettings)
    if config.dry_run:
        find_places(workers, spec.engine.device, spec.engine.threads)  # refuses GPUs that are not there
        dtype = HALF if tries_half(spec, stored) else ""
        return run_report.print_run_plan(config, prepare_job(spec, stored, dtype=dtype, mixes=True))
    spec, make = choose_launch(spec, workers, peer)
    result = _write(config, spec, stored, make, peer, interruption)
    if is_reporting:
        run_report.print_run(config, result, command.text, by=" by this process" if peer else "")
    return interruption.exit_code


def _write(
    config: RunConfig,
    spec: RunSpec,
    stored: Mapping[str, Any] | None,
    make: Callable[..., Result] | None,
    peer: LaunchedProcess | None,
    interruption: Interruption,
) -> Result:
    """The result of a run, once its missing samples are made and written: by `make`, or without it by this process."""
    job, has_gates = None, config.verify or stored is None and config.speed != EXACT
    if make is None or peer is None and (has_gates or tries_half(spec, stored) or may_differ(spec, stored)):
        screen = Screen(partial(print_lines, config), partial(CountProgress, config.quiet))
        job = admit_job(spec, stored, screen, verify=config.verify)
    if make is None:
        print_lines(config, *run_report.describe_start(job))
        counted = {"images": job.images_left, "batch": job.plan.batch_size, "calls": len(job.recipe.schedule)}
    else:
        missing = spec.number - count_rows(spec.folder)
        counted = {"images": -(-min(missing, config.limit or missing) // (peer.world if peer else 1))}
        if job:
            with RunFolder(job.folder, job.document):  # writes run.json
                pass
            job = None  # the other processes need the memory of its networks
    with (
        interruption,
        ImageProgress(is_quiet=config.quiet, count_outside=partial(count_outside, spec.folder), **counted) as progress,
    ):
        signals = {"on_commit": progress.on_commit, "is_stopping": interruption.is_stopping}
        if make is None:
            return write_missing(job, on_unet_call=progress.on_unet_call, **signals)
        from datasetdm_fast.runs.workers.worker import Callbacks  # which a single process does not need

        describe = None if config.quiet else run_report.describe_start
        return make(spec, Callbacks(describe, progress.print, **signals))


if __name__ == "__main__":
    sys.exit(main())
