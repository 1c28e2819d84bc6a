"""python -m datasetdm_fast.label IMAGES: label existing pictures as generate labels its images, into a run folder."""

import sys

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import ImageProgress, print_end, print_lines
from datasetdm_fast.command_line.run_report import count_unnamed, print_run
from datasetdm_fast.command_line.run_settings import expand_names, label_spec, without_whole_labels
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.jobs.labelling import open_pictures, parse_timesteps, prepare_labelling
from datasetdm_fast.runs.jobs.writing import write_missing
from datasetdm_fast.runs.run_folder.document import read_document
from datasetdm_fast.runs.run_settings import LabelConfig

EXAMPLES = ("photos --task semantic --out runs/photos", "photos --labeller attention --classes dog,sofa")


@command_with(LabelConfig, EXAMPLES)
def main(config: LabelConfig, command: CommandLine) -> int:
    config = without_whole_labels(expand_names(config, command.provided), command.provided)
    spec, timesteps = label_spec(config), parse_timesteps(config.timesteps)
    pictures = open_pictures(config.images, config.captions)
    pictures.check_apart(spec.folder)
    job = prepare_labelling(spec, read_document(spec.folder), pictures, timesteps, has_tiles=config.tiles)
    left, calls = job.images_left, job.calls or job.recipe.facts["calls"]
    count, calls_each = count_noun(job.plan.number, "picture"), count_noun(calls, "UNet call")
    plan = f"{left} of {count}, {calls_each} each; labels: {', '.join(job.recipe.tasks)}; run folder: {job.folder}"
    lines = [
        plan if left else f"{job.folder}: complete with {count}, nothing to do",
        *([f"captions: {captions}"] if (captions := count_unnamed(job)) else []),
    ]
    if bare := [name for name, caption in pictures.captions.items() if not caption]:
        lines.append(f"captions: {len(bare)} of {count} without one, such as {bare[0]}")
    if others := pictures.passed_over():
        lines.append(f"left out: {len(others)} not PNG or JPEG, such as {others[0]}")
    if config.dry_run:
        facts = {"path": config.out, "number": job.plan.number, "done": job.done, "tasks": list(job.recipe.tasks)}
        return print_end(config, facts, config.out, *lines)
    print_lines(config, *lines)
    with (
        Interruption(config.quiet) as interruption,
        ImageProgress(left, config.quiet, job.plan.batch_size, calls) as progress,
    ):
        result = write_missing(
            job, on_commit=progress.on_commit, on_unet_call=progress.on_unet_call, is_stopping=interruption.is_stopping
        )
    print_run(config, result, command.text, noun="picture")
    return interruption.exit_code


if __name__ == "__main__":
    sys.exit(main())
