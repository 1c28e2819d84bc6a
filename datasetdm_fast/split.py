"""python -m datasetdm_fast.split RUN: assign samples to training, validation and test; convert follows it."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.output import print_lines, print_plan, print_result
from datasetdm_fast.errors import Refused
from datasetdm_fast.settings import dry_run_setting, setting

PROG = "python -m datasetdm_fast.split"
EXAMPLES = ("runs/demo --shares 80,10,10", "runs/demo --shares 90,10 --names train,val")
USUAL = ("train", "val", "test")
ROUNDED = 0.005  # of the sum, such as that of 33.3,33.3,33.3
NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")


@dataclass(frozen=True)
class SplitConfig:
    run: str = setting("", "run folder", metavar="RUN", positional=True)
    shares: str = setting("80,10,10", "shares of the samples in per cent, in the order of --names", metavar="LIST")
    names: tuple[str, ...] = setting(USUAL, "names of the parts", metavar="LIST")
    by_source: bool = setting(True, "never separate samples made from the same picture: variants, edits, splices")
    seed: int = setting(0, "seed of the random order of the samples", metavar="N")
    undo: bool = setting(False, "remove the split")
    dry_run: bool = dry_run_setting()
    json: bool = setting(False, "machine-readable result on stdout")
    quiet: bool = setting(False, "show no progress")

    def parts(self) -> dict[str, float]:
        """Share by name."""
        try:
            shares = [float(share) for share in self.shares.split(",")]
        except ValueError:
            shares = []
        if not shares or not all(math.isfinite(share) and share >= 0 for share in shares) or not sum(shares):
            raise Refused(
                f"--shares {self.shares}: expected numbers of 0 or more, not all of them 0", "For example 80,10,10."
            )
        if not any(math.isclose(sum(shares), whole, rel_tol=ROUNDED) for whole in (100, 1)):
            near = ",".join(f"{100 * share / sum(shares):.3g}" for share in shares)
            raise Refused(f"--shares {self.shares}: add up to {sum(shares):g}, expected 100", f"For example {near}.")
        if len(self.names) < len(shares) or (len(self.names) > len(shares) and self.names != USUAL):
            raise Refused(
                f"--names {','.join(self.names)}: expected {len(shares)} different names, one for each share",
                "For example train,val,test.",
            )
        if bad := [name for name in self.names if not NAME.fullmatch(name)]:
            raise Refused(f"--names {bad[0]!r}: expected small letters, digits, - or _", "For example train,val,test.")
        return {name: share for name, share in zip(self.names, shares) if share}


@command
def main(arguments: Sequence[str]) -> int:
    config, given = parse(arguments, SplitConfig, PROG, __doc__, EXAMPLES)
    if not config.run:
        raise Refused(f"{PROG}: RUN is missing", "Name the run folder, for example runs/demo.")
    if config.undo and given & {"shares", "names", "by_source", "seed"}:
        raise Refused("--undo: it removes the split, and takes no other flags", "Give only --undo, or drop it.")
    parts = config.parts()
    from datasetdm_fast.runs.run_folder.object_store import refuse_stored
    from datasetdm_fast.runs.run_folder.reader import Run
    from datasetdm_fast.runs.run_folder.seal import SPLIT
    from datasetdm_fast.runs.run_folder.split import Split, dealt, groups, origins, write_split

    path = Path(config.run)
    with Run(path) as run:
        document = run.document
        if config.undo:
            if not (path / SPLIT).exists():
                raise Refused(f"--undo: {path} is not split", "Split it first with --shares.")
            if not config.dry_run:
                write_split(path, document, None)
            return _end(config, {}, f"{path}: {'would be' if config.dry_run else 'is'} split no more")
        refuse_stored(path)  # convert reads the split that is beside the samples
        if not len(run):
            raise Refused(f"{path}: holds no sample", "Name a run folder with samples.")
        indices, keys = [], []
        for row in run.rows(("files",)):
            indices.append(row.request.index)
            keys.append(origins(document, row) if config.by_source else (row.request.id,))
    found = dealt(keys, parts, config.seed)
    split = Split(
        config.seed,
        config.by_source,
        {name: tuple(index for index, part in zip(indices, found) if part == name) for name in parts},
    )
    if not config.dry_run:
        write_split(path, document, split)
    counts = Counter(found)
    told = ", ".join(f"{name} {counts[name]}" for name in parts)
    lone = [name for name in parts if not counts[name]]
    is_apart = len(set(groups(keys))) == len(keys)
    why = "there are too few samples" if is_apart else "too many samples were made of one picture"
    more = f"; none left for {', '.join(lone)}, as {why}" if lone else ""
    return _end(config, {name: counts[name] for name in parts}, f"{path}: {told}{more}")


def _end(config: SplitConfig, counts: dict[str, int], line: str) -> int:
    facts = {"path": config.run, "parts": counts}
    if config.dry_run:
        return print_plan(config, facts, config.run, line)
    print_lines(config, line)
    print_result(config, facts, config.run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
