"""python -m datasetdm_fast.filter RUN: score the samples of a run and keep those that pass; nothing is deleted."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import ImageProgress, print_end
from datasetdm_fast.cores import count_cores
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.settings import OutputSettings, setting

EXAMPLES = ("runs/demo", 'runs/demo --where "score >= 0.6 and duplicate == 0"')


@dataclass(frozen=True)
class FilterConfig(OutputSettings):
    run: str = setting("", "run folder", metavar="RUN", positional=True, required=True)
    where: str = setting(
        "", "keep the samples for which this holds, such as 'score>=0.6 and duplicate==0'", metavar="CONDITION"
    )
    undo: bool = setting(False, "keep all samples again")
    clip: str = setting("", "folder of a CLIP model, which adds the score clip", metavar="DIR")
    threads: int = setting(0, "samples scored at once, 0 = all cores", metavar="N", least=0)


@command_with(FilterConfig, EXAMPLES)
def main(config: FilterConfig, command: CommandLine) -> int:
    if config.undo and command.provided & {"where", "clip"}:
        raise Refused("--undo: it removes the filter, and takes no other flags", "Give only --undo, or drop it.")
    for name, noun in (("where", "condition"), ("clip", "folder")):
        if name in command.provided and not getattr(config, name).strip():
            raise Refused(f"--{name}: no {noun} was given", f"Give a {noun}, or drop the flag.")
    from datasetdm_fast.runs.curation import clip, filtering
    from datasetdm_fast.runs.run_folder.scores import SCORES, passing, read_scores
    from datasetdm_fast.runs.run_folder.selections import FILTER

    verb = "would be" if config.dry_run else "are"
    run = filtering.open_run(config.run)
    if config.undo:
        count = filtering.keep_all(run, is_dry=config.dry_run)
        left_out = "are left out" if config.dry_run else "had been left out"
        line = f"{config.run}: all samples {verb} kept again, {count} {left_out}"
        return print_end(config, {"path": config.run, "restored": count}, config.run, line)
    if config.where:
        filtering.check_condition(run, config.where, has_clip=bool(config.clip))  # before hours of scoring
    digest = clip.digest_of(Path(config.clip)) if config.clip else ""
    if missing := filtering.count_missing(run, digest):
        if config.dry_run and config.where:
            remedy = "Score them first: run the command without --where."
            lack = f"{count_noun(missing, 'sample')} {'has' if missing == 1 else 'have'} no scores yet"
            raise Refused(f"--dry-run: {lack}", remedy)
        if config.dry_run:
            line = f"{config.run}: {count_noun(missing, 'sample')} would be scored"
            return print_end(config, {"path": config.run, "scored": missing}, config.run, line)
        network = clip.Clip(Path(config.clip), digest) if config.clip else None
        with Interruption(config.quiet) as interruption, ImageProgress(missing, config.quiet) as progress:
            threads = config.threads or count_cores()
            filtering.score_missing(run, network, threads, progress.on_commit, interruption.is_stopping)
        if interruption.signal:
            print("not all samples are scored; the same command resumes", file=sys.stderr)
            return interruption.exit_code
    elif not config.dry_run:
        filtering.finish_scored(run)
    if not config.where:
        table = read_scores(run.ledger)
        bins = {name: filtering.compute_histogram(table, name) for name in SCORES}
        print(json.dumps(bins) if config.json else "\n".join(filtering.histogram_lines(table, bins)))
        return 0
    decision = passing(run.path, run.ledger, config.where)
    if not config.dry_run:
        run.replace_file(FILTER, decision.content)
    facts, lines = filtering.summarize(run, decision, verb)
    return print_end(config, {"path": config.run, **facts}, config.run, *lines)


if __name__ == "__main__":
    sys.exit(main())
