"""python -m datasetdm_fast.generate: generate images and their labels from prompts; without any flag, the demo run."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from datasetdm_fast.command_line import run_report, run_settings
from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import ImageProgress, print_lines
from datasetdm_fast.command_line.run_settings import Launch, choose_launch
from datasetdm_fast.config import EXACT
from datasetdm_fast.runs.agreement.admission import Screen, admit_job
from datasetdm_fast.runs.jobs.run import Decision, Outcome, RunQueue
from datasetdm_fast.runs.jobs.writing import Result, count_outside, write_missing
from datasetdm_fast.runs.run_folder.document import SHARDS
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_settings import RunConfig, RunSpec, WorkerSettings
from datasetdm_fast.runs.workers.devices import find_peer, find_places

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
    spec, run = run_settings.read_spec(config), RunQueue.open(Path(config.out))
    if peer:
        run_settings.check_judged(config, run.stored is not None)
    is_reporting = not (peer and peer.rank)
    decision = run.decide(spec, is_alone=peer is None, is_dry=config.dry_run)
    config = replace(config, quiet=config.quiet or not is_reporting)
    interruption = Interruption(config.quiet)
    if decision.outcome is Outcome.DONE:
        return run_report.print_finished_run(config, decision.result) if is_reporting else 0
    run_settings.check_sources(config)
    if sys.stderr.isatty():  # libraries and networks take seconds to load
        print_lines(config, f"loading    {config.model}")
    workers = config.group(WorkerSettings)
    if config.dry_run:
        find_places(workers, spec.engine.device, spec.engine.threads)  # refuses GPUs that are not there
        return run_report.print_run_plan(config, run.plan(spec))
    spec, launch = choose_launch(spec, workers, peer)
    result = _write(config, spec, run, decision, launch, interruption)
    if is_reporting:
        run_report.print_run(config, result, command.text, by=" by this process" if peer else "")
    return interruption.exit_code


def _write(
    config: RunConfig, spec: RunSpec, run: RunQueue, decision: Decision, launch: Launch, interruption: Interruption
) -> Result:
    """The result of a run, once its missing samples are made and written."""
    job, counted = None, {"images": -(-min(decision.missing, config.limit or decision.missing) // launch.processes)}
    has_gates = config.verify or run.stored is None and config.speed != EXACT
    if launch.run is None or launch.may_compare and (has_gates or run.tries_half(spec) or run.may_differ(spec)):
        screen = Screen(partial(print_lines, config), partial(run_report.show_calls, config.quiet))
        job = admit_job(run, spec, screen, verify=config.verify)
    if launch.run is None:
        print_lines(config, *run_report.describe_start(job))
        counted = {"images": job.images_left, "batch": job.plan.batch_size, "calls": len(job.recipe.schedule)}
    elif job:
        with RunFolder(job.folder, job.document):  # writes run.json
            pass
        job = None  # the other processes need the memory of its networks
    with (
        interruption,
        ImageProgress(is_quiet=config.quiet, count_outside=partial(count_outside, spec.folder), **counted) as progress,
    ):
        signals = {"on_unet_call": progress.on_unet_call, "is_stopping": interruption.is_stopping}
        if launch.run is None:
            return write_missing(job, on_commit=progress.on_commit, **signals)
        from datasetdm_fast.runs.workers.worker import Callbacks  # which a single process does not need

        describe = None if config.quiet else run_report.describe_start
        return launch.run(spec, Callbacks(describe, progress.print, progress.on_commit, **signals))


if __name__ == "__main__":
    sys.exit(main())
