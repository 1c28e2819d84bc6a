"""python -m datasetdm_fast.label IMAGES: the labels of generate for pictures that exist, as a run folder."""

import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.progress import ImageProgress, counted, duration
from datasetdm_fast.config import LabelConfig
from datasetdm_fast.generation.inverted import as_stored, prepare, remake, tileable
from datasetdm_fast.generation.run import run
from datasetdm_fast.generation.settings import check_settings, spelled_out
from datasetdm_fast.run_folder.showing import ShownSoFar

PROG = "python -m datasetdm_fast.label"
EXAMPLES = (
    "photos --task semantic --out runs/photos",
    "photos --labeller attention --classes dog,sofa",
)


@command
def main(arguments: Sequence[str]) -> int:
    config, given = parse(arguments, LabelConfig, PROG, __doc__, EXAMPLES)
    config = as_stored(config) if config.only else tileable(spelled_out(config, given), given)
    check_settings(config)
    job = prepare(config)
    if config.only:
        written = remake(job, config.only)
        told = f"{counted(len(written), 'file')} written" if written else "every byte as it was"
        _say(config, f"sample {config.only}: made again, {told}")
        _put(config, {"path": config.out, "id": config.only, "written": written})
        return 0
    left, calls = job.plan.number - job.done, job.calls or job.recipe.facts["calls"]
    _say(
        config,
        f"{left} of {job.plan.number} pictures, {counted(calls, 'UNet call')} each; labels: "
        f"{', '.join(job.recipe.tasks)}; run folder: {job.folder}",
    )
    if config.dry_run:
        return 0
    with (
        Interruption(config.quiet) as interruption,
        ImageProgress(min(left, config.limit or left), config.quiet, job.plan.batch_size, calls) as progress,
        ShownSoFar(job.folder, config.page_every, progress.print),
    ):
        result = run(
            job,
            on_commit=progress.on_commit,
            on_unet_call=progress.on_unet_call,
            is_stopping=interruption.is_stopping,
        )
    facts = {"number": result.number, "done": result.done, "made": result.made, "set_aside": result.set_aside}
    _put(config, {"path": config.out, **facts, "complete": result.is_complete})
    _say(
        config,
        f"{counted(result.made, 'picture')} in {duration(result.seconds)}; look at {result.path}/gallery/index.html",
    )
    result.check()
    if not result.is_complete:
        again = f"{PROG} {shlex.join(arguments)}"
        print(f"{result.done} of {result.number} pictures are labelled; go on with: {again}", file=sys.stderr)
    return interruption.exit_code(0)


def _put(config: LabelConfig, facts: dict[str, Any]) -> None:
    print(json.dumps(facts) if config.json else config.out, flush=True)


def _say(config: LabelConfig, line: str) -> None:
    if not config.quiet:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
