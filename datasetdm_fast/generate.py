"""python -m datasetdm_fast.generate: generate images and their labels from prompts; without any flag, the demo run."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import (
    NOTHING_WRITTEN,
    print_lines,
    print_result,
    print_unfinished,
    remake_sample,
)
from datasetdm_fast.command_line.progress import ImageProgress
from datasetdm_fast.config import HALF, REFERENCE
from datasetdm_fast.cores import count_cores
from datasetdm_fast.errors import GateFailed, Refused, quote
from datasetdm_fast.messages import count_noun, format_duration
from datasetdm_fast.runs.agreement.during import RepeatedComparison
from datasetdm_fast.runs.gallery.showing import ShownSoFar
from datasetdm_fast.runs.jobs.defaults import with_folder, with_labels
from datasetdm_fast.runs.jobs.job import Job, count_rows, finished, in_all, may_differ, measures, prepare, refill
from datasetdm_fast.runs.jobs.racing import probe
from datasetdm_fast.runs.jobs.result import Result
from datasetdm_fast.runs.jobs.run import prepare_remake, remake, run
from datasetdm_fast.runs.jobs.settings import count_images, spelled_out
from datasetdm_fast.runs.jobs.summary import calls_left, table
from datasetdm_fast.runs.run_folder import object_store
from datasetdm_fast.runs.run_folder.document import read_document
from datasetdm_fast.runs.run_folder.folder import RunFolder, note
from datasetdm_fast.runs.run_settings import RunConfig
from datasetdm_fast.runs.workers import devices, launched, ray_driver, spawn
from datasetdm_fast.runs.workers.launched import LaunchedProcess
from datasetdm_fast.runs.workers.worker import Callbacks, Compare

PROG = "python -m datasetdm_fast.generate"
EXAMPLES = (
    "--number 16",
    "--model MODEL --decoder decoder --task semantic,depth --prompts prompts.txt --out runs/rooms",
    "--only 00000003 --out runs/rooms",
)


@command
def main(arguments: Sequence[str]) -> int:
    config, given = parse(arguments, RunConfig, PROG, __doc__, EXAMPLES)
    config = with_folder(spelled_out(with_labels(config, given), given), given)
    for name in ("prompts", "classes", "accept"):
        if name in given and not getattr(config, name):
            raise Refused(f"--{name}: no value was given", f"Drop the flag, or see {PROG} --help.")
    if config.only:
        return _make_again(config, given)
    peer = None if config.dry_run else launched.this_peer()
    _check_together(config, peer)
    if config.refill:
        refill(config)
    if peer and peer.rank:  # the first of them tells how it ended
        config = replace(config, quiet=True)
    if result := finished(config, is_alone=peer is None):
        return 0 if peer and peer.rank else _nothing_to_do(config, result)
    if config.format:
        from datasetdm_fast.runs.exporting.conversion import check_not_exported

        check_not_exported(Path(config.out))
    if sys.stderr.isatty():  # who waits there hears why: libraries and networks take seconds
        print_lines(config, f"loading    {config.model}")
    if config.dry_run:
        return _plan_alone(config)
    interruption = Interruption(config.quiet)
    places = () if peer or config.cluster else devices.places(config)
    if places and (config.verify or measures(config) or may_differ(config)):
        _begin(config)
    if peer:
        config = launched.settle_on(config, peer)
        result = _run_together(config, partial(launched.run, config, peer), interruption, peer)
        if peer.rank:
            return interruption.exit_code(0)
    elif config.cluster:
        result = _run_together(config, partial(ray_driver.run, config), interruption)
    elif places:
        result = _run_together(config, partial(spawn.run, config, places), interruption)
    else:
        result = _run_here(config, interruption)
    code = _end(config, result, by=" by this process" if peer else "")
    if not result.is_complete:
        remedy = f"go on with: {PROG} {shlex.join(arguments)}".rstrip()
        print_unfinished(result.done, result.number, remedy)
    return interruption.exit_code(code)


def _check_together(config: RunConfig, peer: LaunchedProcess | None) -> None:
    """Refuses flags that do not go together, or not where `peer` is one of several processes that were started."""
    object_store.check(config)
    if config.format:
        from datasetdm_fast.runs.exporting.conversion import check_formats

        if config.store:
            raise Refused(
                "--format: the samples go to an object store", "Convert the run by its URL once it is finished."
            )
        check_formats(config.format, config.task)
    if config.verify_every and config.engine == REFERENCE:
        raise Refused(
            f"--verify-every {config.verify_every}: the engine is {REFERENCE}, the reference", "Leave it out."
        )
    if peer and config.cluster:
        raise Refused(
            f"--cluster {config.cluster}: this is one of {peer.world} processes that were started together",
            "Start one process alone.",
        )
    if peer and config.refill:
        raise Refused(
            f"--refill: this is one of {peer.world} processes that were started together",
            "Run the command once with --refill --limit 1, alone; then start them without it.",
        )
    if config.verify and not config.dry_run and (peer or config.cluster):
        raise Refused(
            f"--verify {config.verify}: several machines or processes that were started together make this run",
            "Run the command once alone with --limit 1, then start them without --verify: run.json keeps the verdict.",
        )


def _nothing_to_do(config: RunConfig, result: Result) -> int:
    """The exit code of a run that was finished before."""
    if config.store and not config.dry_run:
        object_store.ObjectStore(config.store).complete(result.path)
    print_lines(config, f"{result.path}: complete with {count_noun(result.done, 'sample')}, nothing to do")
    return _end(config, result)


def _plan_alone(config: RunConfig) -> int:
    """The exit code of a dry run, once it has shown what would be made."""
    job = prepare(config, dtype=HALF if measures(config) else "", mixes=True)
    print_lines(config, *table(job))
    _show_plan(job)
    print_lines(config, NOTHING_WRITTEN)
    return 0


def _run_here(config: RunConfig, interruption: Interruption) -> Result:
    job = _decided(config, races=True)
    print_lines(config, *table(job, job.call_seconds or probe(job.engine, job.plan.batch_size, calls_left(job))))
    if config.verify:
        job = _verified(config, job)
    compare = _comparison(config)
    with (
        interruption,
        ImageProgress(job.images_left, config.quiet, job.plan.batch_size, len(job.recipe.schedule)) as progress,
        ShownSoFar(job.folder, config.page_every, progress.print),
    ):
        return run(
            job,
            on_commit=progress.on_commit,
            on_unet_call=progress.on_unet_call,
            is_stopping=interruption.is_stopping,
            **({"before_commit": compare(job, on_message=progress.print)} if compare else {}),
        )


def _comparison(config: RunConfig) -> Compare | None:
    """What compares samples of a run while it goes on, where --verify-every asks for it."""
    return partial(RepeatedComparison, every=config.verify_every) if config.verify_every else None


def _begin(config: RunConfig) -> None:
    """What is compared before several processes make the run: the folder they find tells that it was done."""
    job = _decided(config)
    if config.verify:
        job = _verified(config, job)
    with RunFolder(job.folder, job.document):
        pass


def _decided(config: RunConfig, *, races: bool = False) -> Job:
    """The job with the precision that --dtype auto takes in a new folder, or with leave to go on with an old one."""
    if measures(config):
        return _measured(config, races=races)
    return _mixed(config, prepare(config, races=races, mixes=True))


def _measured(config: RunConfig, *, races: bool = False) -> Job:
    """The job in the precision that --dtype auto takes."""
    from datasetdm_fast.runs.agreement import before

    job = prepare(config, races=races, dtype=HALF)
    if not job.half:
        return job
    calls = before.calls_of(job, min(before.MEASURED, job.plan.number))
    with _calls_bar(job.half, calls, config.quiet) as advance:
        return before.measured(job, lambda: prepare(config, races=races, dtype="fp32"), advance)


def _mixed(config: RunConfig, job: Job) -> Job:
    """The job where its engine is one that the run folder knows, or makes samples of it again as they are there."""
    if not job.differing:
        return job
    from datasetdm_fast.runs.agreement import mixing

    indices = mixing.chosen(job)
    print_lines(config, f"mixed      another engine than before ({'; '.join(job.differing)})")
    calls = -(-len(indices) // job.plan.batch_size) * len(job.recipe.schedule)
    with _calls_bar("compare", calls, config.quiet) as on_unet_call:
        rows = mixing.compared(job, indices, on_unet_call) if indices else []
    if failed := [row.measure for row in rows if not row.is_passed]:
        raise GateFailed(
            f"{job.folder}: {job.engine.name} does not reproduce its samples, {', '.join(failed)} beyond "
            f"the limit in {count_noun(len(indices), 'sample')} ({'; '.join(job.differing)}); nothing was written",
            "Continue with the engine that started it, or choose another --out.",
        )
    print_lines(
        config, f"mixed      {job.engine.name} makes {count_noun(len(indices), 'sample')} again as they are there"
    )
    job, entries = mixing.mixed(job, rows, len(indices))
    note(job.folder, "mixed", entries)
    return job


def _verified(config: RunConfig, job: Job) -> Job:
    """The job with the verdict on its engine, an earlier one where that still holds."""
    from datasetdm_fast.runs.agreement import before

    stored, number = read_document(job.folder), min(config.verify, job.plan.number)
    earlier = (stored or job.document).get("verified")
    if before.holds(earlier, job.engine, number):
        print_lines(
            config, f"verified   {count_noun(earlier['number'], 'sample')} agreed before, with this engine and device"
        )
        return job
    calls = before.calls_of(job, number)
    with _calls_bar("verify", calls, config.quiet) as on_unet_call:
        verdict = before.compared(job, number, on_unet_call)
    failed = [row.measure for row in verdict.rows if not row.is_passed]
    if failed and not config.verify_anyway:
        raise GateFailed(
            f"--verify {number}: outputs of {job.engine.name} do not match those of {REFERENCE} in "
            f"{', '.join(failed)}; nothing was written",
            "Try --dtype fp32 or another --engine; --verify-anyway makes the run and writes this down.",
        )
    told = f"does NOT agree in {', '.join(failed)}" if failed else f"agrees in all {len(verdict.rows)} measures"
    print_lines(config, f"verified   {job.engine.name} {told} with {REFERENCE} on {count_noun(number, 'sample')}")
    facts = before.kept(verdict, job.engine)
    if stored is not None:
        note(job.folder, "verified", facts)
    return replace(job, document=job.document | {"verified": facts})


@contextmanager
def _calls_bar(title: str, calls: int, is_quiet: bool) -> Iterator[Callable[[], None]]:
    """A bar of so many UNet calls; what it gives is to be called after each."""
    from tqdm import tqdm

    with tqdm(total=calls, desc=title, unit="call", disable=is_quiet or None, file=sys.stderr) as bar:
        yield bar.update


def _run_together(
    config: RunConfig,
    start: Callable[[Callbacks], Result],
    interruption: Interruption,
    peer: LaunchedProcess | None = None,
) -> Result:
    """The same of a run of several processes, of which this one counts the images of all, or its share of them."""
    processes = peer.world if peer else 1
    # where several machines share the ledger, who reads it keeps the others from committing
    minutes = 0.0 if peer and (peer.rank or peer.is_on_several_machines) else config.page_every
    stored = read_document(Path(config.out))
    number = count_images(config)
    left = (in_all(number, stored, Path(config.out)) if stored else number) - count_rows(config)
    images = -(-min(left, config.limit or left) // processes)
    with (
        interruption,
        ImageProgress(images, config.quiet) as progress,
        ShownSoFar(Path(config.out), minutes, progress.print),
    ):
        told = Callbacks(table, progress.print, progress.on_commit, interruption.is_stopping)
        return start(replace(told, compare=_comparison(config)))


def _make_again(config: RunConfig, given: set[str]) -> int:
    task = prepare_remake(config, given)
    return remake_sample(config, str(task.folder), task.row.request.id, partial(remake, task))


def _end(config: RunConfig, result: Result, by: str = "") -> int:
    rate = result.made / result.seconds if result.made else 0.0
    facts = {"number": result.number, "done": result.done, "made": result.made, "set_aside": result.set_aside}
    facts |= {"doubtful": result.doubtful, "complete": result.is_complete, "images_per_second": round(rate, 4)}
    facts |= {"closing_seconds": round(result.closing_seconds, 3)}
    print_result(config, {"path": str(result.path), **facts}, str(result.path))
    if result.made:
        closing = f"{format_duration(result.closing_seconds)} of it for index files and gallery"
        made = f"{count_noun(result.made, 'image')}{by} in {format_duration(result.seconds)}"
        speed = f"{made} ({closing}), {rate:.3g} images per second"
        print_lines(config, f"{speed}; look at {_page(config, result)}")
    if result.told:
        print_lines(config, result.told)
    if config.format and result.is_complete and not config.dry_run:
        _convert(config, result)
    result.check()
    return 0


def _page(config: RunConfig, result: Result) -> str:
    """What shows the samples of a run: its page or, where that is in an object store, a command."""
    if not config.store:
        return f"{result.path}/gallery/index.html"
    place = config.store if result.is_complete else str(result.path)
    return f"them with: python -m datasetdm_fast.gallery {quote(place)} --serve"


def _convert(config: RunConfig, result: Result) -> None:
    """Writes the formats that were asked for; the same line goes on with them where it was interrupted."""
    from datasetdm_fast.runs.exporting.conversion import export_run

    found = export_run(result.path, config.format, config.threads or count_cores())
    print_lines(
        config, f"{result.path}/exports: {found.samples} samples as {', '.join(config.format)}, {found.files} files"
    )


def _show_plan(job: Job) -> None:
    if not job.config.json:
        for request in job.plan:
            print(f"{request.id}  seed {request.seed}  {request.prompt!r}")
        return
    facts = {"path": str(job.folder), **job.recipe.facts, "batch_size": job.plan.batch_size, "bytes": job.bytes_needed}
    names = ("id", "seed", "prompt", "classes")
    requests = [{name: getattr(request, name) for name in names} for request in job.plan]
    print(json.dumps({**facts, "requests": requests}))


if __name__ == "__main__":
    sys.exit(main())
