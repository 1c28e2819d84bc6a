"""python -m datasetdm_fast.convert RUN... --to coco,yolo-seg: write samples of run folders in the layouts that trainers
read.

With --to decoder, pth or diffusers it converts checkpoints: `convert FILE --to decoder --help` shows these flags.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import print_lines, print_plan, print_result
from datasetdm_fast.command_line.progress import ImageProgress
from datasetdm_fast.cores import count_cores
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.exporting import checkpoints
from datasetdm_fast.runs.exporting.settings import ExportSettings
from datasetdm_fast.runs.run_folder.document import EXPORTS
from datasetdm_fast.runs.run_folder.object_store import is_url

if TYPE_CHECKING:
    from datasetdm_fast.runs.exporting.conversion import Conversion

PROG = "python -m datasetdm_fast.convert"
EXAMPLES = (
    "runs/demo --to coco,yolo-seg",
    "runs/day runs/night --to voc --border 5 --classes person=human --out exports",
)


@command
def main(arguments: Sequence[str]) -> int:
    if checkpoints.is_meant(arguments):
        return checkpoints.run(arguments)
    settings, given = parse(arguments, ExportSettings, PROG, __doc__, EXAMPLES)
    settings.check()
    if not settings.runs:
        raise Refused(f"{PROG}: RUN is missing", "Name the run folder, for example runs/demo.")
    if not settings.to:
        raise Refused(f"{PROG}: --to is missing", "Name one or more formats, for example --to coco.")
    if not settings.out and len(settings.runs) > 1:
        raise Refused(f"{PROG}: --out is missing", "Name a folder for the export of several runs.")
    if "quality" in given and settings.image_format == "png":
        raise Refused("--quality: PNG files have none", "Drop it, or give --image-format jpg.")
    if "where" in given and not settings.where.strip():
        raise Refused("--where: no condition was given", "Write a condition, or drop the flag.")
    if not settings.out and is_url(settings.runs[0]):
        raise Refused(f"{PROG}: --out is missing", "Name a folder here for the export of a run in an object store.")
    folder = Path(settings.out) if settings.out else Path(settings.runs[0]) / EXPORTS
    conversion = _opened(settings, folder)
    for source in conversion.sources:
        if not source.run.is_complete:
            there = count_noun(len(source.run), "sample")
            print_lines(settings, f"{source.run.path}: not finished; what is there is converted: {there}")
    for path in conversion.unsplit:
        print_lines(settings, f"{path}: not split as the other runs are, so that all of its samples are in train")
    for name, format in conversion.formats.items():
        if unknown := format.unknown(conversion.plan):
            print_lines(settings, f"{name}: it has no class {', '.join(unknown)}, which --classes can rename")
    if settings.dry_run:
        would = f"{count_noun(conversion.samples, 'sample')} would be written as {', '.join(settings.to)}"
        facts = {"path": str(folder), "samples": conversion.samples, "splits": conversion.splits}
        conversion.close()
        told = f"{folder}: {'complete, nothing to do' if conversion.is_complete else would}"
        return print_plan(settings, facts, str(folder), told)
    with (
        Interruption(settings.quiet) as interruption,
        ImageProgress(conversion.samples, settings.quiet) as progress,
    ):
        threads = settings.threads or count_cores()
        result = conversion.run(threads, progress.on_commit, interruption.is_stopping)
    conversion.close()
    if not result.is_complete:
        print(f"{folder}: not complete; resume with: {PROG} {shlex.join(arguments)}", file=sys.stderr)
        return interruption.exit_code(0)
    splits = ", ".join(f"{name} {count}" for name, count in conversion.splits.items())
    samples, files = count_noun(result.samples, "sample"), count_noun(result.files, "file")
    told = f"{samples} ({splits}) as {', '.join(settings.to)}, {files}"
    print_lines(
        settings, f"{folder}: complete, {told}; nothing to do" if conversion.is_complete else f"{folder}: {told}"
    )
    facts = {"path": str(folder), "samples": result.samples, "made": result.made, "files": result.files}
    print_result(settings, {**facts, "splits": conversion.splits}, str(folder))
    return interruption.exit_code(0)


def _opened(settings: ExportSettings, folder: Path) -> Conversion:
    from datasetdm_fast.runs.exporting.conversion import Conversion, open_source

    places = [place if is_url(place) else str(Path(place).resolve()) for place in settings.runs]
    if twice := [place for k, place in enumerate(settings.runs) if places[k] in places[:k]]:
        raise Refused(f"{twice[0]}: was named twice, so its samples would be, too", "Name each run once.")
    sources = []
    for place in settings.runs:
        chosen = _passing(Path(place), settings.where) if settings.where else None
        sources.append(open_source(place, settings, chosen))
    return Conversion(sources, settings, folder)


def _passing(path: Path, where: str) -> frozenset[int]:
    """The samples of a run for which a condition on scores holds."""
    from datasetdm_fast.runs.curation import filtering
    from datasetdm_fast.runs.run_folder.score_table import passing

    run = filtering.check(path)
    filtering.check_all_scored(run)
    return frozenset(passing(path, where).kept)


if __name__ == "__main__":
    sys.exit(main())
