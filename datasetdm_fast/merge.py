"""python -m datasetdm_fast.merge RUN... --out ALL: one run of several, every sample once."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.progress import ImageProgress, counted
from datasetdm_fast.config import setting
from datasetdm_fast.errors import Refused

PROG = "python -m datasetdm_fast.merge"


@dataclass(frozen=True)
class MergeConfig:
    runs: tuple[str, ...] = setting(
        (), "finished run folders, in the order of their samples", metavar="RUN", positional=True
    )
    out: str = setting("", "run folder", metavar="RUN", output="folder")
    kept: bool = setting(False, "take only the samples that filter keeps")
    copy: bool = setting(False, "copy files instead of linking to them")
    dry_run: bool = setting(False, "say how many samples the run would have, and write nothing")
    only: str = setting("", "take over this one sample of the run folder --out again", metavar="ID")
    json: bool = setting(False, "machine-readable result on stdout")
    quiet: bool = setting(False, "show no progress")


@command
def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, MergeConfig, PROG, __doc__)
    if not config.out:
        raise Refused(f"{PROG}: --out is missing", "Name the run folder that is to be written.")
    from datasetdm_fast.compositions.merging import Merging, begin, open_part, remake, run

    if config.only:
        written = remake(Path(config.out), config.only)
        _say(
            config,
            f"sample {config.only}: {counted(len(written), 'file')} written" if written else "every byte as it was",
        )
        _put(config, {"path": config.out, "id": config.only, "written": written})
        return 0
    if len(config.runs) < 2:
        raise Refused(f"{PROG}: {len(config.runs)} runs, expected two or more", "Name the run folders to be merged.")
    folder = Path(config.out)
    merging = Merging([open_part(Path(path), only_kept=config.kept) for path in config.runs])
    number, there = len(merging.places), begin(merging, folder)
    if config.dry_run:
        merging.close()
        _say(config, f"{folder}: would have {number} samples, {there} are there, {merging.duplicates} are left out")
        _put(config, {"path": config.out, "number": number, "done": there, "duplicates": merging.duplicates})
        return 0
    with Interruption(config.quiet) as interruption, ImageProgress(number - there, config.quiet) as progress:
        options = {"on_commit": progress.on_commit, "is_stopping": interruption.is_stopping}
        made = run(merging, folder, is_copied=config.copy, **options)
    merging.close()
    done = there + made
    if done < number:
        print(f"{done} of {number} samples are there; go on with: {PROG} {shlex.join(arguments)}", file=sys.stderr)
    else:
        more = f", {merging.duplicates} left out as their images were there before" if merging.duplicates else ""
        _say(config, f"{folder}: complete with {done} samples{more}" + ("" if made else ", nothing to do"))
    facts = {"number": number, "done": done, "made": made, "duplicates": merging.duplicates}
    _put(config, {"path": config.out, **facts, "complete": done == number})
    return interruption.exit_code(0)


def _put(config: MergeConfig, facts: dict[str, Any]) -> None:
    print(json.dumps(facts) if config.json else config.out, flush=True)


def _say(config: MergeConfig, line: str) -> None:
    if not config.quiet:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
