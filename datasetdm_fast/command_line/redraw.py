"""The commands edit and vary: making the missing images of a redrawing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import ImageProgress, print_end, print_lines
from datasetdm_fast.command_line.run_report import print_finished_run, print_run
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.compositions.settings import RedrawSettings

if TYPE_CHECKING:
    from datasetdm_fast.runs.compositions.redraw import Redrawing


def redraw(cls: type[Redrawing], settings: RedrawSettings, resume_with: str) -> int:
    """The exit code of a command that makes the images of a redrawing; the same command resumes it."""
    from datasetdm_fast.runs.compositions.redraw import find_result, open_source, prepare
    from datasetdm_fast.runs.jobs.writing import write_missing

    settings = replace(settings, only=(*settings.only, *settings.ids), ids=())
    folder = Path(settings.out)
    redrawing = cls(open_source(Path(settings.run), only_kept=settings.kept), settings)
    if result := find_result(redrawing, folder, is_dry=settings.dry_run):
        return print_finished_run(settings, result)
    job = prepare(redrawing, folder)
    if settings.dry_run:
        facts = {"path": settings.out, "number": job.plan.number, "done": job.done, "bytes": job.bytes_needed}
        plan = f"{folder}: {job.images_left} of {count_noun(job.plan.number, 'image')} would be made"
        return print_end(settings, facts, settings.out, redrawing.summary, plan)
    print_lines(settings, redrawing.summary)
    calls = len(job.recipe.schedule)
    with (
        Interruption(settings.quiet) as interruption,
        ImageProgress(job.images_left, settings.quiet, job.plan.batch_size, calls) as progress,
    ):
        callbacks = {"on_commit": progress.on_commit, "on_unet_call": progress.on_unet_call}
        result = write_missing(job, is_stopping=interruption.is_stopping, **callbacks)
    print_run(settings, result, resume_with)
    return interruption.exit_code
