"""python -m datasetdm_fast.convert RUN --to coco,yolo-seg: write samples of a run in the layouts that trainers read.

With --to decoder, pth or diffusers it converts checkpoints: `convert FILE --to decoder --help` shows these flags.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from datasetdm_fast.command_line.checkpoints import convert_checkpoint, is_of_checkpoints
from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import ImageProgress, print_end, print_lines, print_result
from datasetdm_fast.cores import count_cores
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.exporting.export_folder import open_target, remove_notes
from datasetdm_fast.runs.exporting.settings import ExportSettings
from datasetdm_fast.runs.run_folder.document import EXPORTS
from datasetdm_fast.runs.run_folder.shard_places import is_url

if TYPE_CHECKING:
    from datasetdm_fast.runs.exporting.conversion import Conversion
    from datasetdm_fast.runs.run_folder.shard_places import ShardBucket

PROG = "python -m datasetdm_fast.convert"
EXAMPLES = ("runs/demo --to coco,yolo-seg", "runs/demo --to voc --border 5 --classes person=human --out exports")


@command
def main(arguments: Sequence[str]) -> int:
    if is_of_checkpoints(arguments):
        return convert_checkpoint(arguments)
    settings, flags = parse(arguments, ExportSettings, PROG, __doc__, EXAMPLES)
    if not settings.out and is_url(settings.run):
        raise Refused(f"{PROG}: --out is missing", "Name a folder for the export of a remote run.")
    if "quality" in flags and settings.image_format == "png":
        raise Refused("--quality: PNG files have none", "Drop it, or give --image-format jpg.")
    if "where" in flags and not settings.where.strip():
        raise Refused("--where: no condition was given", "Write a condition, or drop the flag.")
    if settings.push_to_hub:
        from datasetdm_fast.runs.exporting.hf import check_hub

        check_hub(settings.push_to_hub)
    place = settings.out or str(Path(settings.run) / EXPORTS)
    folder, store = open_target(place)
    if settings.push_to_hub and store:
        raise Refused(f"--push-to-hub: the export is made at {place}", "Name a folder with --out.")
    try:
        conversion = _open_conversion(settings, folder, store)
    except Refused as stop:
        raise Refused(stop.cause.replace(str(folder), place), stop.remedy) from stop
    print_lines(settings, *conversion.notes())
    formats, facts = ", ".join(settings.to), {"path": place, "samples": conversion.samples}
    if settings.dry_run:
        plan = f"{count_noun(conversion.samples, 'sample')} would be written as {formats}"
        conversion.close()
        plan = "complete, nothing to do" if conversion.is_complete else plan
        plan += f", and be uploaded to {settings.push_to_hub}" if settings.push_to_hub else ""
        return print_end(settings, {**facts, "splits": conversion.splits}, place, f"{place}: {plan}")
    if store and conversion.is_complete:
        remove_notes(store)  # a process may have been killed before it did
        print_lines(settings, f"{place}: complete, nothing to do")
        print_result(settings, facts | {"splits": conversion.splits}, place)
        return 0
    with Interruption(settings.quiet) as interruption, ImageProgress(conversion.samples, settings.quiet) as progress:
        threads = settings.threads or count_cores()
        result = conversion.run(threads, progress.on_commit, interruption.is_stopping)
    conversion.close()
    if not result.is_complete:
        print(f"{place}: not complete; resume with: {PROG} {shlex.join(arguments)}", file=sys.stderr)
        return interruption.exit_code
    print_lines(settings, *conversion.limits)
    splits = ", ".join(f"{name} {count}" for name, count in conversion.splits.items())
    summary = f"{count_noun(result.samples, 'sample')} ({splits}) as {formats}, {count_noun(result.files, 'file')}"
    if conversion.is_complete:
        summary = f"complete, {summary}; nothing to do"
    print_lines(settings, f"{place}: {summary}")
    facts |= {"made": result.made, "files": result.files, "splits": conversion.splits}
    if settings.push_to_hub:
        from datasetdm_fast.runs.exporting.hf import push_to_hub

        facts["url"] = push_to_hub(folder, settings.push_to_hub)
        print_lines(settings, f"{place}: uploaded to {facts['url']}")
    print_result(settings, facts, place)
    return interruption.exit_code


def _open_conversion(settings: ExportSettings, folder: Path, store: ShardBucket | None) -> Conversion:
    from datasetdm_fast.runs.curation.filtering import open_run, select
    from datasetdm_fast.runs.exporting.conversion import Conversion
    from datasetdm_fast.runs.exporting.sources import open_source

    chosen = select(open_run(settings.run), settings.where) if settings.where else None
    source = open_source(settings.run, tasks=settings.task, only_kept=settings.kept, chosen=chosen)
    if settings.part:
        source = source.take_part(settings.part)
    renaming, identity = settings.classes, settings.identity()
    options = {"renaming": renaming, "pictures": settings, "layout": settings, "is_copied": settings.copy}
    return Conversion(source, settings.to, folder, identity, store=store, **options)


if __name__ == "__main__":
    sys.exit(main())
