"""What the commands edit and vary do alike: make the missing images, tell how it went, make one sample again."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import print_lines, print_plan, print_result, print_unfinished, remake_sample
from datasetdm_fast.command_line.progress import ImageProgress
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun, format_duration
from datasetdm_fast.runs.compositions.settings import RedrawSettings
from datasetdm_fast.settings import flags_of

if TYPE_CHECKING:
    from datasetdm_fast.runs.compositions.redraw import Redrawing
    from datasetdm_fast.runs.jobs.job import Job
    from datasetdm_fast.runs.jobs.result import Result


def make(cls: type[Redrawing], settings: RedrawSettings, prog: str, arguments: Sequence[str]) -> int:
    """The exit code of a command that makes the images of a redrawing; the same line resumes it."""
    from datasetdm_fast.runs.compositions import redraw

    settings.check()
    folder = Path(settings.out)
    redrawing = cls(redraw.drawn_source(Path(settings.run), only_kept=settings.kept), settings)
    if result := redraw.finished(redrawing, folder):
        print_lines(settings, f"{folder}: complete with {count_noun(result.done, 'sample')}, nothing to do")
        return _end(settings, result)
    job = redraw.prepare(redrawing, folder)
    if settings.dry_run:
        facts = {"path": settings.out, "number": job.plan.number, "done": job.done, "bytes": job.bytes_needed}
        told = f"{folder}: {job.images_left} of {count_noun(job.plan.number, 'image')} would be made"
        return print_plan(settings, facts, settings.out, redrawing.told, told)
    print_lines(settings, redrawing.told)
    interruption = Interruption(settings.quiet)
    result = _run(job, interruption)
    code = _end(settings, result)
    if not result.is_complete:
        print_unfinished(result.done, result.number, f"go on with: {prog} {shlex.join(arguments)}")
    return interruption.exit_code(code)


def _run(job: Job, interruption: Interruption) -> Result:
    from datasetdm_fast.runs.jobs.run import run

    calls = len(job.recipe.schedule)
    with interruption, ImageProgress(job.images_left, job.config.quiet, job.plan.batch_size, calls) as progress:
        options = {"on_commit": progress.on_commit, "on_unet_call": progress.on_unet_call}
        return run(job, is_stopping=interruption.is_stopping, **options)


def make_again(cls: type[Redrawing], settings: RedrawSettings, given: Collection[str]) -> int:
    """The exit code of a command that makes one sample of its run folder again, whose settings may not be `given`."""
    from datasetdm_fast.runs.compositions.redraw import prepare_remake
    from datasetdm_fast.runs.jobs.run import remake

    told = [flag.name for flag in flags_of(type(settings)) if flag.metadata["identity"] and flag.name in given]
    if told != ["only"]:
        flags = _flags(name for name in told if name != "only")
        raise Refused(
            f"--only {settings.only[0]}: makes a sample of {settings.out} again, with the settings of its run.json",
            f"Drop {flags}.",
        )
    task = prepare_remake(cls, settings)
    return remake_sample(settings, settings.out, task.row.request.id, partial(remake, task))


def without_run(settings: RedrawSettings, given: Collection[str]) -> Refused:
    """The refusal of --only with settings that change samples of RUN, but without RUN."""
    flags = _flags(sorted(given))
    return Refused(
        f"--only {settings.only[0]}: with {flags} it takes a sample of RUN, which is missing",
        f"Name RUN first, or drop {flags} to make the sample of {settings.out} again.",
    )


def _flags(names: Iterable[str]) -> str:
    return ", ".join("--" + name.strip("_").replace("_", "-") for name in names)


def _end(settings: RedrawSettings, result: Result) -> int:
    rate = result.made / result.seconds if result.made else 0.0
    facts = {"number": result.number, "done": result.done, "made": result.made, "set_aside": result.set_aside}
    facts |= {"doubtful": result.doubtful, "complete": result.is_complete, "images_per_second": round(rate, 4)}
    print_result(settings, {"path": str(result.path), **facts}, str(result.path))
    if result.made:
        speed = f"{count_noun(result.made, 'image')} in {format_duration(result.seconds)}, {rate:.3g} images per second"
        print_lines(settings, f"{speed}; look at {result.path}/gallery/index.html")
    if result.doubtful:
        print_lines(settings, result.doubts)
    result.check()
    return 0
