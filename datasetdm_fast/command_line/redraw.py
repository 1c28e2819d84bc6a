"""The commands edit and vary: making the missing images of a redrawing."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import print_lines, print_plan, print_result, print_unfinished
from datasetdm_fast.command_line.progress import ImageProgress
from datasetdm_fast.messages import count_noun, format_duration
from datasetdm_fast.runs.compositions.settings import RedrawSettings

if TYPE_CHECKING:
    from datasetdm_fast.runs.compositions.redraw import Redrawing
    from datasetdm_fast.runs.jobs.result import Result


def redraw(cls: type[Redrawing], settings: RedrawSettings, prog: str, arguments: Sequence[str]) -> int:
    """The exit code of a command that makes the images of a redrawing; the same command resumes it."""
    from datasetdm_fast.runs.compositions.redraw import find_result, open_source, prepare
    from datasetdm_fast.runs.jobs.writing import write_missing

    settings = replace(settings, only=(*settings.only, *settings.ids), ids=())
    folder = Path(settings.out)
    redrawing = cls(open_source(Path(settings.run), only_kept=settings.kept), settings)
    if result := find_result(redrawing, folder, is_dry=settings.dry_run):
        print_lines(settings, f"{folder}: complete with {count_noun(result.done, 'sample')}, nothing to do")
        return _print_end(settings, result)
    job = prepare(redrawing, folder, settings)
    if settings.dry_run:
        facts = {"path": settings.out, "number": job.plan.number, "done": job.done, "bytes": job.bytes_needed}
        plan = f"{folder}: {job.images_left} of {count_noun(job.plan.number, 'image')} would be made"
        return print_plan(settings, facts, settings.out, redrawing.summary, plan)
    print_lines(settings, redrawing.summary)
    calls = len(job.recipe.schedule)
    with (
        Interruption(settings.quiet) as interruption,
        ImageProgress(job.images_left, settings.quiet, job.plan.batch_size, calls) as progress,
    ):
        callbacks = {"on_commit": progress.on_commit, "on_unet_call": progress.on_unet_call}
        result = write_missing(job, is_stopping=interruption.is_stopping, **callbacks)
    code = _print_end(settings, result)
    if not result.is_complete:
        print_unfinished(result.done, result.number, f"resume with: {prog} {shlex.join(arguments)}")
    return interruption.exit_code(code)


def _print_end(settings: RedrawSettings, result: Result) -> int:
    print_result(settings, {"path": str(result.path), **result.facts()}, str(result.path))
    if result.made:
        images = f"{count_noun(result.made, 'image')} in {format_duration(result.seconds)}"
        print_lines(
            settings, f"{images}, {result.rate:.3g} images per second; look at {result.path}/gallery/index.html"
        )
    if result.doubtful:
        print_lines(settings, result.doubts)
    result.check()
    return 0
