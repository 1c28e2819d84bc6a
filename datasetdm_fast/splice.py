"""python -m datasetdm_fast.splice RUN: combine samples of a finished run side by side in new pictures, with their
labels.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import print_lines, print_plan, print_result, print_unfinished, remake_sample
from datasetdm_fast.command_line.progress import ImageProgress
from datasetdm_fast.cores import count_cores
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun, format_duration
from datasetdm_fast.settings import dry_run_setting, setting

if TYPE_CHECKING:
    from datasetdm_fast.runs.compositions.splice import Splicing

PROG = "python -m datasetdm_fast.splice"
EXAMPLES = ("runs/demo --grids 2x2 --number 100",)
MOST = 2**31  # samples of a run


@dataclass(frozen=True)
class SpliceConfig:
    run: str = setting("", "run folder whose samples are spliced", metavar="RUN", positional=True)
    grids: tuple[str, ...] = setting(
        ("2",), "grids, taken in turn: 3 is 3x3, 1x2 one row of two pictures, at most 8x8", metavar="LIST"
    )
    number: int = setting(100, "images to make in all", metavar="N")
    seed: int = setting(0, "seed of image 0; image k has seed + k, which picks its samples", metavar="N")
    resize: bool = setting(False, "keep the size of one sample; else a grid is as large as its samples together")
    kept: bool = setting(False, "use only the samples that filter keeps")
    out: str = setting("runs/spliced", "run folder", metavar="RUN", output="folder")
    only: str = setting("", "make this one sample of the run folder --out again", metavar="ID")
    limit: int = setting(0, "stop after N new images; the same command resumes", metavar="N")
    dry_run: bool = dry_run_setting()
    threads: int = setting(0, "threads, 0 = two per core", metavar="N")
    json: bool = setting(False, "machine-readable result on stdout")
    quiet: bool = setting(False, "show no progress")

    def check(self) -> None:
        """Refuses numbers that cannot be."""
        for name, least in (("number", 1), ("limit", 0), ("threads", 0)):
            if not least <= (value := getattr(self, name)) < MOST:
                raise Refused(
                    f"--{name} {value}: expected a number from {least} to {MOST - 1}", "Choose another number."
                )
        if not -(2**63) <= self.seed < 2**63 - self.number:
            raise Refused(f"--seed {self.seed}: seeds have 64 bits", "Choose a smaller number.")


@command
def main(arguments: Sequence[str]) -> int:
    config, given = parse(arguments, SpliceConfig, PROG, __doc__, EXAMPLES)
    config.check()
    if config.only:
        from datasetdm_fast.runs.compositions.splice import CONFIG_FORM, remake, to_remake

        folder = Path(config.out)
        asked = {name: getattr(config, name) for name in CONFIG_FORM if name in given}
        sample = to_remake(folder, config.only, asked)
        return remake_sample(config, config.out, config.only, partial(remake, folder, *sample, config.run))
    if not config.run:
        raise Refused(f"{PROG}: RUN is missing", "Name the run folder whose samples are spliced, such as runs/demo.")
    from datasetdm_fast.runs.compositions.splice import begin, run

    splicing, folder = _opened(config), Path(config.out)
    there = begin(splicing, folder)
    left = config.number - there
    left = min(left, config.limit or left)
    if config.dry_run:
        told = f"{folder}: {left} of {count_noun(config.number, 'image')} would be made"
        return print_plan(config, {"path": config.out, "number": config.number, "done": there}, config.out, told)
    threads = config.threads or 2 * count_cores()  # half of them wait for the disk
    with Interruption(config.quiet) as interruption, ImageProgress(left, config.quiet) as progress:
        options = {"limit": config.limit, "threads": threads, "on_commit": progress.on_commit}
        made, seconds = run(splicing, folder, is_stopping=interruption.is_stopping, **options)
    done = there + made
    rate = round(made / seconds, 4) if made else 0.0
    facts = {"number": config.number, "done": done, "made": made, "complete": done == config.number}
    print_result(config, {"path": config.out, **facts, "images_per_second": rate}, config.out)
    if made:
        speed = f"{count_noun(made, 'image')} in {format_duration(seconds)}, {rate:.3g} images per second"
        print_lines(config, f"{speed}; look at {folder}/gallery/index.html")
    if done < config.number:
        print_unfinished(done, config.number, f"go on with: {PROG} {shlex.join(arguments)}")
    elif not made:
        print_lines(config, f"{folder}: complete with {count_noun(done, 'sample')}, nothing to do")
    return interruption.exit_code(0)


def _opened(config: SpliceConfig) -> Splicing:
    from datasetdm_fast.runs.compositions.grids import parse_grids
    from datasetdm_fast.runs.compositions.source import Source
    from datasetdm_fast.runs.compositions.splice import Splicing

    grids = parse_grids(config.grids)
    source = Source(Path(config.run), only_kept=config.kept)
    return Splicing(source, grids, config.number, config.seed, config.resize)


if __name__ == "__main__":
    sys.exit(main())
