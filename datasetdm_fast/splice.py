"""python -m datasetdm_fast.splice RUN: combine samples of a finished run side by side, with their labels."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import print_lines, print_plan, print_result, print_unfinished
from datasetdm_fast.command_line.progress import ImageProgress
from datasetdm_fast.config import SEEDS
from datasetdm_fast.cores import count_cores
from datasetdm_fast.messages import count_noun, format_duration
from datasetdm_fast.settings import OutputSettings, setting

EXAMPLES = ("runs/demo --grids 2x2 --number 100",)
MOST = 2**31 - 1  # samples of a run


@dataclass(frozen=True)
class SpliceConfig(OutputSettings):
    FLAGS = "run grids number seed resize kept out limit dry_run threads json quiet".split()

    run: str = setting("", "run folder whose samples are spliced", metavar="RUN", positional=True, required=True)
    grids: tuple[str, ...] = setting(
        ("2",), "grids, taken in turn: 3 is 3x3, 1x2 one row of two pictures, at most 8x8", metavar="LIST"
    )
    number: int = setting(100, "images to make in all", metavar="N", least=1, most=MOST)
    seed: int = setting(
        0, "seed of image 0; image k has seed + k, and so its samples", metavar="N", least=-SEEDS, most=SEEDS - MOST
    )
    resize: bool = setting(False, "keep the size of one sample; else a grid is as large as its samples together")
    kept: bool = setting(False, "use only the samples that filter keeps")
    out: str = setting("runs/spliced", "run folder", metavar="RUN", output="folder")
    limit: int = setting(0, "stop after N new images; the same command resumes", metavar="N", least=0)
    threads: int = setting(0, "threads, 0 = two per core", metavar="N", least=0, most=1024)


@command_with(SpliceConfig, EXAMPLES)
def main(config: SpliceConfig, command: CommandLine) -> int:
    from datasetdm_fast.runs.compositions.composition import TileSource, count_existing, write_missing
    from datasetdm_fast.runs.compositions.splice import Splicing, parse_grids

    folder = Path(config.out)
    grids, source = parse_grids(config.grids), TileSource(Path(config.run), only_kept=config.kept)
    splicing, start = Splicing(source, grids, config.number, config.seed, config.resize), time.perf_counter()
    existing = count_existing(folder, splicing.document)
    splicing.check_room(folder)
    left = min(config.number - existing, config.limit or config.number)
    if config.dry_run:
        plan = f"{folder}: {left} of {count_noun(config.number, 'image')} would be made"
        return print_plan(config, {"path": config.out, "number": config.number, "done": existing}, config.out, plan)
    threads = config.threads or 2 * count_cores()  # half of them wait for the disk
    with Interruption(config.quiet) as interruption, ImageProgress(left, config.quiet) as progress:
        callbacks = {"on_commit": progress.on_commit, "is_stopping": interruption.is_stopping}
        made = write_missing(splicing, folder, limit=config.limit, threads=threads, **callbacks)
    seconds, done = time.perf_counter() - start, existing + made
    rate = made / seconds
    facts = {"number": config.number, "done": done, "made": made, "complete": done == config.number}
    print_result(config, {"path": config.out, **facts, "images_per_second": round(rate, 4)}, config.out)
    if made:
        speed = f"{count_noun(made, 'image')} in {format_duration(seconds)}, {rate:.3g} images per second"
        print_lines(config, f"{speed}; look at {folder}/gallery/index.html")
    if done < config.number:
        print_unfinished(done, config.number, command.text)
    elif not made:
        print_lines(config, f"{folder}: complete with {count_noun(done, 'sample')}, nothing to do")
    return interruption.exit_code(0)


if __name__ == "__main__":
    sys.exit(main())
