"""python -m datasetdm_fast.merge RUN... --out ALL: merge several runs into one, every sample once."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import print_lines, print_plan, print_result, print_unfinished, remake_sample
from datasetdm_fast.command_line.progress import ImageProgress
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.settings import dry_run_setting, setting

PROG = "python -m datasetdm_fast.merge"
EXAMPLES = ("runs/day runs/night --out runs/all",)


@dataclass(frozen=True)
class MergeConfig:
    runs: tuple[str, ...] = setting(
        (), "finished run folders, in the order of their samples", metavar="RUN", positional=True
    )
    out: str = setting("", "run folder", metavar="RUN", output="folder")
    kept: bool = setting(False, "take only the samples that filter keeps")
    copy: bool = setting(False, "copy files instead of linking to them")
    dry_run: bool = dry_run_setting()
    only: str = setting("", "take over this one sample of the run folder --out again", metavar="ID")
    json: bool = setting(False, "machine-readable result on stdout")
    quiet: bool = setting(False, "show no progress")


@command
def main(arguments: Sequence[str]) -> int:
    config, given = parse(arguments, MergeConfig, PROG, __doc__, EXAMPLES)
    if not config.out:
        raise Refused(f"{PROG}: --out is missing", "Name the run folder that is to be written.")
    from datasetdm_fast.runs.compositions.merging import Merging, begin, open_part, remake, run, to_remake

    folder = Path(config.out)
    if config.only:
        sample = to_remake(folder, config.only, {"kept": config.kept} if "kept" in given else {})
        return remake_sample(config, config.out, config.only, partial(remake, folder, *sample, config.runs))
    if len(config.runs) < 2:
        told = "one run" if config.runs else "no run"
        raise Refused(f"{PROG}: {told} was named, expected two or more", "Name the run folders to be merged.")
    merging = Merging([open_part(Path(path), only_kept=config.kept) for path in config.runs])
    number, there = len(merging.places), begin(merging, folder)
    if config.dry_run:
        merging.close()
        told = (
            f"{folder}: would have {count_noun(number, 'sample')}, {there} are there, {merging.duplicates} are left out"
        )
        facts = {"path": config.out, "number": number, "done": there, "duplicates": merging.duplicates}
        return print_plan(config, facts, config.out, told)
    with Interruption(config.quiet) as interruption, ImageProgress(number - there, config.quiet) as progress:
        options = {"on_commit": progress.on_commit, "is_stopping": interruption.is_stopping}
        made = run(merging, folder, is_copied=config.copy, **options)
    merging.close()
    done = there + made
    if done < number:
        print_unfinished(done, number, f"go on with: {PROG} {shlex.join(arguments)}")
    else:
        more = f", {merging.duplicates} left out as their images were there before" if merging.duplicates else ""
        print_lines(
            config, f"{folder}: complete with {count_noun(done, 'sample')}{more}" + ("" if made else ", nothing to do")
        )
    facts = {"number": number, "done": done, "made": made, "duplicates": merging.duplicates}
    print_result(config, {"path": config.out, **facts, "complete": done == number}, config.out)
    return interruption.exit_code(0)


if __name__ == "__main__":
    sys.exit(main())
