"""python -m datasetdm_fast.label IMAGES: label existing pictures as generate labels its images, into a run folder."""

import shlex
import sys
from collections.abc import Sequence

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import print_lines, print_plan, print_result, print_unfinished
from datasetdm_fast.command_line.progress import ImageProgress
from datasetdm_fast.command_line.run_settings import (
    expand_names,
    label_spec,
    without_whole_labels,
)
from datasetdm_fast.messages import count_noun, format_duration
from datasetdm_fast.runs.gallery.showing import ShownSoFar
from datasetdm_fast.runs.jobs.labelling import parse_timesteps, prepare_labelling
from datasetdm_fast.runs.jobs.pictures import open_pictures
from datasetdm_fast.runs.jobs.summary import count_unnamed
from datasetdm_fast.runs.jobs.writing import write_missing
from datasetdm_fast.runs.run_folder.document import read_document
from datasetdm_fast.runs.run_settings import LabelConfig

PROG = "python -m datasetdm_fast.label"
EXAMPLES = (
    "photos --task semantic --out runs/photos",
    "photos --labeller attention --classes dog,sofa",
)


@command
def main(arguments: Sequence[str]) -> int:
    config, provided = parse(arguments, LabelConfig, PROG, __doc__, EXAMPLES)
    config = without_whole_labels(expand_names(config, provided), provided)
    spec, timesteps = label_spec(config), parse_timesteps(config.timesteps)
    pictures = open_pictures(config.images, config.captions)
    pictures.check_apart(spec.folder)
    job = prepare_labelling(spec, read_document(spec.folder), pictures, timesteps, has_tiles=config.tiles)
    left, calls = job.images_left, job.calls or job.recipe.facts["calls"]
    lines = [
        f"{left} of {count_noun(job.plan.number, 'picture')}, {count_noun(calls, 'UNet call')} each; labels: "
        f"{', '.join(job.recipe.tasks)}; run folder: {job.folder}",
        *([f"captions: {captions}"] if (captions := count_unnamed(job)) else []),
    ]
    if config.dry_run:
        facts = {"path": config.out, "number": job.plan.number, "done": job.done, "tasks": list(job.recipe.tasks)}
        return print_plan(config, facts, config.out, *lines)
    print_lines(config, *lines)
    with (
        Interruption(config.quiet) as interruption,
        ImageProgress(left, config.quiet, job.plan.batch_size, calls) as progress,
        ShownSoFar(job.folder, config.page_every, progress.print),
    ):
        result = write_missing(
            job,
            on_commit=progress.on_commit,
            on_unet_call=progress.on_unet_call,
            is_stopping=interruption.is_stopping,
        )
    print_result(config, {"path": config.out, **result.facts()}, config.out)
    images = f"{count_noun(result.made, 'picture')} in {format_duration(result.seconds)}"
    print_lines(config, f"{images}; look at {result.path}/gallery/index.html")
    if result.trust_message:
        print_lines(config, result.trust_message)
    result.check()
    if not result.is_complete:
        print_unfinished(result.done, result.number, f"resume with: {PROG} {shlex.join(arguments)}", "pictures")
    return interruption.exit_code(0)


if __name__ == "__main__":
    sys.exit(main())
