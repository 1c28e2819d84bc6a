"""python -m datasetdm_fast.split RUN: assign samples to training, validation and test; convert follows it."""

import sys
from dataclasses import dataclass

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.output import print_end
from datasetdm_fast.errors import Refused
from datasetdm_fast.settings import OutputSettings, setting

EXAMPLES = ("runs/demo --shares 80,10,10", "runs/demo --shares 90,10 --names train,val")


@dataclass(frozen=True)
class SplitConfig(OutputSettings):
    run: str = setting("", "run folder", metavar="RUN", positional=True, required=True)
    shares: str = setting("80,10,10", "shares of the samples in per cent, in the order of --names", metavar="LIST")
    names: tuple[str, ...] = setting(("train", "val", "test"), "names of the parts", metavar="LIST")
    by_source: bool = setting(True, "never separate samples made from the same picture: variants and edits")
    seed: int = setting(0, "seed of the random order of the samples", metavar="N")
    undo: bool = setting(False, "remove the split")


@command_with(SplitConfig, EXAMPLES)
def main(config: SplitConfig, command: CommandLine) -> int:
    if config.undo and command.provided & {"shares", "names", "by_source", "seed"}:
        raise Refused("--undo: it removes the split, and takes no other flags", "Give only --undo, or drop it.")
    from datasetdm_fast.runs.curation.splitting import parse_shares, split_run
    from datasetdm_fast.runs.run_folder.reader import open_run
    from datasetdm_fast.runs.run_folder.selections import SPLIT

    split, counts = None, {}
    shares = parse_shares(config.shares, config.names)
    with open_run(config.run) as run:
        if not config.undo:
            split, problem = split_run(run, shares, config.seed, by_source=config.by_source)
            counts = {name: len(indices) for name, indices in split.parts.items()}
            line = ", ".join(f"{name} {count}" for name, count in counts.items())
            line += f"; {problem}" if problem else ""
        elif (run.path / SPLIT).exists():
            line = f"{'would be' if config.dry_run else 'is'} split no more"
        else:
            raise Refused(f"--undo: {config.run} is not split", "Split it first with --shares.")
    if not config.dry_run:
        run.replace_file(SPLIT, split and split.content)
    return print_end(config, {"path": config.run, "parts": counts}, config.run, f"{config.run}: {line}")


if __name__ == "__main__":
    sys.exit(main())
