"""python -m datasetdm_fast.filter RUN: score the samples of a run and keep those that pass; nothing is deleted."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import print_lines, print_plan, print_result
from datasetdm_fast.command_line.progress import ImageProgress
from datasetdm_fast.cores import count_cores
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.settings import dry_run_setting, setting

if TYPE_CHECKING:
    from datasetdm_fast.runs.curation.filtering import Bin
    from datasetdm_fast.runs.run_folder.reader import Run

PROG = "python -m datasetdm_fast.filter"
EXAMPLES = (
    "runs/demo",
    'runs/demo --where "score >= 0.6 and duplicate == 0"',
)
BAR = 24  # letters of the longest bar of a histogram
SHOWN = 8  # classes of a histogram


@dataclass(frozen=True)
class FilterConfig:
    run: str = setting("", "run folder", metavar="RUN", positional=True)
    where: str = setting(
        "", "keep the samples for which this holds, such as 'score>=0.6 and duplicate==0'", metavar="CONDITION"
    )
    undo: bool = setting(False, "keep all samples again")
    dry_run: bool = dry_run_setting()
    clip: str = setting("", "folder of a CLIP model, which adds the score clip", metavar="DIR")
    stability: bool = setting(False, "adds the score stability, with the model and the decoders of the run")
    threads: int = setting(0, "samples scored at once, 0 = all cores", metavar="N")
    json: bool = setting(False, "machine-readable result on stdout")
    quiet: bool = setting(False, "show no progress")


@command
def main(arguments: Sequence[str]) -> int:
    config, given = parse(arguments, FilterConfig, PROG, __doc__, EXAMPLES)
    if not config.run:
        raise Refused(f"{PROG}: RUN is missing", "Name the run folder, for example runs/demo.")
    if config.threads < 0:
        raise Refused(f"--threads {config.threads}: expected a number of 0 or more", "Choose another number.")
    if config.undo and given & {"where", "clip", "stability"}:
        raise Refused("--undo: it removes the filter, and takes no other flags", "Give only --undo, or drop it.")
    for name, what in (("where", "condition"), ("clip", "folder")):
        if name in given and not getattr(config, name).strip():
            raise Refused(f"--{name}: no {what} was given", f"Give a {what}, or drop the flag.")
    from datasetdm_fast.runs.curation import filtering
    from datasetdm_fast.runs.run_folder.score_table import OF_NETWORKS, SCORES
    from datasetdm_fast.runs.run_folder.where import parse_where

    if config.undo:
        return _undo(config)
    names = parse_where(config.where, tuple(SCORES))[1] if config.where else ()  # before hours of scoring
    run = filtering.check(Path(config.run))
    extra = [name for name in OF_NETWORKS if getattr(config, name)]
    filtering.check_made(run, names, extra)
    clip = _digest_of_clip(config)
    if left := filtering.count_missing(run, extra, clip):
        if config.dry_run and config.where:
            raise Refused(
                f"--dry-run: {left} samples have no scores yet", "Score them first: run the command without --where."
            )
        if config.dry_run:
            told = f"{config.run}: {count_noun(left, 'sample')} would be scored"
            return print_plan(config, {"path": config.run, "scored": left}, config.run, told)
        networks = _networks(config, run, clip)
        with Interruption(config.quiet) as interruption, ImageProgress(left, config.quiet) as progress:
            filtering.complete(
                run,
                networks,
                config.threads or count_cores(),
                progress.on_commit,
                interruption.is_stopping,
            )
        if interruption.signal:
            print("not all samples are scored; the same command resumes", file=sys.stderr)
            return interruption.exit_code(0)
    elif not config.dry_run:
        filtering.close(run)
    return _keep(config, run) if config.where else _show(config, run)


def _digest_of_clip(config: FilterConfig) -> str:
    if not config.clip:
        return ""
    from datasetdm_fast.runs.curation.clip import digest_of

    return digest_of(Path(config.clip))


def _networks(config: FilterConfig, run: Run, clip: str) -> dict[str, Any]:
    """Score -> what makes it, for the scores that need a network; `clip` is the digest of the CLIP."""
    found: dict[str, Any] = {}
    if config.clip:
        from datasetdm_fast.runs.curation.clip import Clip

        found["clip"] = Clip(Path(config.clip), clip)
    if config.stability:
        from datasetdm_fast.runs.curation.stability import Stability

        found["stability"] = Stability(run, config.threads)
    return found


def _undo(config: FilterConfig) -> int:
    from datasetdm_fast.runs.curation import filtering

    count = filtering.undo(filtering.check(Path(config.run)), is_dry=config.dry_run)
    facts = {"path": config.run, "restored": count}
    if config.dry_run:
        told = f"{config.run}: all samples would be kept again, {count} are left out"
        return print_plan(config, facts, config.run, told)
    print_lines(config, f"{config.run}: all samples are kept again, {count} had been left out")
    print_result(config, facts, config.run)
    return 0


def _keep(config: FilterConfig, run: Run) -> int:
    from datasetdm_fast.runs.curation import filtering
    from datasetdm_fast.runs.run_folder.score_table import read_scores

    decided = filtering.decide(run, config.where, is_dry=config.dry_run)
    total = len(decided.kept) + len(decided.left_out)
    others = f"; {config.run}/state/kept.json says why the others are not" if decided.left_out else ""
    print_lines(
        config, f"{len(decided.kept)} of {total} samples {'would be kept' if config.dry_run else f'are kept{others}'}"
    )
    table = read_scores(run.path, ())
    kept, every = set(decided.kept), Counter(word for words in table.classes for word in words)
    left = Counter(
        word for index, words in zip(table.indices, table.classes, strict=True) if index in kept for word in words
    )
    if every:
        told = ", ".join(f"{word} {left[word]} of {count}" for word, count in every.most_common())
        print_lines(config, f"of each class: {told}")
    facts = {"path": config.run, "where": decided.where, "kept": len(decided.kept), "left_out": len(decided.left_out)}
    facts["classes"] = {word: [left[word], count] for word, count in every.items()}
    if config.dry_run:
        return print_plan(config, facts, config.run)
    print_result(config, facts, config.run)
    return 0


def _show(config: FilterConfig, run: Run) -> int:
    """Histograms of all scores, and what a threshold at each bin leaves."""
    from datasetdm_fast.runs.curation import filtering
    from datasetdm_fast.runs.run_folder.score_table import SCORES, read_scores

    table = read_scores(run.path)
    bins = {name: filtering.histogram(table, name) for name in SCORES}
    if config.json:
        print(json.dumps({name: [asdict(each) for each in found] for name, found in bins.items()}))
        return 0
    words = [word for word, _ in Counter(word for each in table.classes for word in each).most_common(SHOWN)]
    for name, found in bins.items():
        if found:
            print(f"{name}: {SCORES[name]}")
            print("\n".join([*_lines(found, words), ""]))
    return 0


def _lines(bins: Sequence[Bin], words: Sequence[str]) -> Iterator[str]:
    most = max(each.samples for each in bins)
    widths = [max(len(word), 5) for word in words]
    head = " ".join(f"{word:>{width}}" for word, width in zip(words, widths, strict=True))
    yield f"{'from':>10} {'samples':>8} {'':{BAR}} {'at least':>9} {head}".rstrip()
    for each in bins:
        bar = "#" * -(-each.samples * BAR // most)
        left = (f"{each.left_by_class.get(word, 0):>{width}}" for word, width in zip(words, widths, strict=True))
        yield f"{each.least:>10.4g} {each.samples:>8} {bar:{BAR}} {each.left:>9} {' '.join(left)}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
