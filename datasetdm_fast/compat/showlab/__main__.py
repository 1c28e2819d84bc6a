"""python -m datasetdm_fast.compat.showlab SCRIPT: a command line of DatasetDM's script/*.sh, run by this package."""

import shlex
import sys
from collections.abc import Sequence
from types import SimpleNamespace

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import ImageProgress, print_lines, print_result, print_unfinished
from datasetdm_fast.compat.showlab.generator import GENERATORS, Generator
from datasetdm_fast.compat.showlab.lines import Line, read_line
from datasetdm_fast.errors import Refused, nearest, renamed_flags
from datasetdm_fast.messages import count_noun, format_duration

PROG = "python -m datasetdm_fast.compat.showlab"
TRAIN = "docs/from-datasetdm.md has the line of `train` that each of DatasetDM's trainers stands for."


@command
def main(arguments: Sequence[str]) -> int:
    """The exit code of the script named by the first argument."""
    name = arguments[0].removesuffix(".py").rpartition("/")[2] if arguments else ""
    if name in ("-h", "--help", ""):
        print(f"usage: {PROG} SCRIPT [flags of the script]\n")
        for each, script in GENERATORS.items():
            print(f"  {each}\n      {script.description}")
        print("\nSCRIPT --help lists the flags. docs/from-datasetdm.md lists the differences.")
        return 0
    if name not in GENERATORS:
        remedy = TRAIN if name.startswith("train") else f"`{PROG} --help` lists them."
        raise Refused(f"{PROG}: unknown script {name!r}{nearest(name, GENERATORS)}", remedy)
    script = GENERATORS[name]
    with renamed_flags({"--out": "--outdir"}):
        return generate(
            script,
            read_line(PROG, name, script.description, script.flags, arguments[1:]),
            f"{PROG} {shlex.join(arguments)}",
        )


def generate(script: Generator, line: Line, same_command: str) -> int:
    """Makes the missing images of a command line; its exit code."""
    from datasetdm_fast.compat.showlab import generating

    settings, order = SimpleNamespace(**line.values), script.order(line)
    spec, stored, result = generating.open_order(order)
    interruption = Interruption(settings.quiet)
    if result is not None:
        print_lines(settings, f"{order.out}: complete with {count_noun(result.done, 'image')}, nothing to do")
    else:
        job = generating.prepare(order, spec, stored)
        print_lines(settings, *generating.rows(order, job))
        if settings.dry_run:
            for item in order.items:
                print(f"{item.stem}  seed {item.seed}  {item.prompt!r}")
            return 0
        progress = ImageProgress(job.images_left, settings.quiet, 1, len(job.recipe.schedule))
        with interruption, progress:
            callbacks = {"on_commit": progress.on_commit, "on_unet_call": progress.on_unet_call}
            result = generating.make(order, job, is_stopping=interruption.is_stopping, **callbacks)
        speed = f"{count_noun(result.made, 'image')} in {format_duration(result.seconds)}"
        print_lines(settings, f"{speed}; look at {result.path}/gallery/index.html")
    print_result(settings, {"path": str(order.out), "run": str(result.path), **result.facts()}, str(order.out))
    result.check()
    if not result.is_complete:
        print_unfinished(result.done, result.number, same_command, "images")
    return interruption.exit_code


if __name__ == "__main__":
    sys.exit(main())
