"""python -m datasetdm_fast.label IMAGES: label existing pictures as generate labels its images, into a run folder."""

import shlex
import sys
from collections.abc import Sequence
from functools import partial

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import print_lines, print_plan, print_result, print_unfinished, remake_sample
from datasetdm_fast.command_line.progress import ImageProgress
from datasetdm_fast.messages import count_noun, format_duration
from datasetdm_fast.runs.gallery.showing import ShownSoFar
from datasetdm_fast.runs.jobs.inverted import as_stored, prepare, remake, tileable
from datasetdm_fast.runs.jobs.run import run
from datasetdm_fast.runs.jobs.settings import check_settings, spelled_out
from datasetdm_fast.runs.jobs.summary import unnamed
from datasetdm_fast.runs.run_settings import LabelConfig

PROG = "python -m datasetdm_fast.label"
EXAMPLES = (
    "photos --task semantic --out runs/photos",
    "photos --labeller attention --classes dog,sofa",
)


@command
def main(arguments: Sequence[str]) -> int:
    config, given = parse(arguments, LabelConfig, PROG, __doc__, EXAMPLES)
    asked = tileable(spelled_out(config, given), given)
    config = as_stored(asked, given) if config.only else asked
    check_settings(config)
    job = prepare(config)
    if config.only:
        return remake_sample(config, config.out, config.only, partial(remake, job, config.only))
    left, calls = job.images_left, job.calls or job.recipe.facts["calls"]
    told = [
        f"{left} of {count_noun(job.plan.number, 'picture')}, {count_noun(calls, 'UNet call')} each; labels: "
        f"{', '.join(job.recipe.tasks)}; run folder: {job.folder}",
        *([f"captions: {captions}"] if (captions := unnamed(job)) else []),
    ]
    if config.dry_run:
        facts = {"path": config.out, "number": job.plan.number, "done": job.done, "tasks": list(job.recipe.tasks)}
        return print_plan(config, facts, config.out, *told)
    print_lines(config, *told)
    with (
        Interruption(config.quiet) as interruption,
        ImageProgress(left, config.quiet, job.plan.batch_size, calls) as progress,
        ShownSoFar(job.folder, config.page_every, progress.print),
    ):
        result = run(
            job,
            on_commit=progress.on_commit,
            on_unet_call=progress.on_unet_call,
            is_stopping=interruption.is_stopping,
        )
    facts = {"number": result.number, "done": result.done, "made": result.made, "set_aside": result.set_aside}
    print_result(config, {"path": config.out, **facts, "complete": result.is_complete}, config.out)
    pictures = f"{count_noun(result.made, 'picture')} in {format_duration(result.seconds)}"
    print_lines(config, f"{pictures}; look at {result.path}/gallery/index.html")
    result.check()
    if not result.is_complete:
        print_unfinished(result.done, result.number, f"go on with: {PROG} {shlex.join(arguments)}", "pictures")
    return interruption.exit_code(0)


if __name__ == "__main__":
    sys.exit(main())
