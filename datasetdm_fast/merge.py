"""python -m datasetdm_fast.merge RUN... --out ALL: merge several runs into one, every sample once."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.interruption import Interruption
from datasetdm_fast.command_line.output import ImageProgress, print_end, print_lines, print_result, print_unfinished
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.settings import OutputSettings, setting

EXAMPLES = ("runs/day runs/night --out runs/all", "s3://bucket/day s3://bucket/night --out s3://bucket/all")


@dataclass(frozen=True)
class MergeConfig(OutputSettings):
    runs: tuple[str, ...] = setting(
        (), "finished runs, all of them folders or in shards, in the order of samples", metavar="RUN", positional=True
    )
    out: str = setting("", "run folder; of shards also a URL", metavar="RUN", output="place", required=True)
    kept: bool = setting(False, "take only the samples that filter keeps")
    copy: bool = setting(False, "copy files instead of linking to them")


@command_with(MergeConfig, EXAMPLES)
def main(config: MergeConfig, command: CommandLine) -> int:
    from datasetdm_fast.runs.compositions.composition import Source, count_existing
    from datasetdm_fast.runs.compositions.merging import Merging, ShardMerging, write_missing
    from datasetdm_fast.runs.run_folder.audit import find_sharded
    from datasetdm_fast.runs.run_folder.reader import open_run

    if len(config.runs) < 2:
        count = count_noun(len(config.runs), "run") if config.runs else "no run"
        raise Refused(f"{command.prog}: {count} named, expected two or more", "Name the run folders to be merged.")
    if any(find_sharded(path) is not None for path in config.runs):
        sources = [Source(path, only_kept=config.kept, may_be_sharded=True) for path in config.runs]
        shards = ShardMerging(sources, config.out)
        merging: Merging = shards
        existing, write = shards.count_existing(), shards.write_missing
    else:
        folder, merging = Path(config.out), Merging([Source(Path(path), only_kept=config.kept) for path in config.runs])
        existing = count_existing(folder, merging.document)
        write = partial(write_missing, merging, folder, is_linked=not config.copy)
    number = merging.number
    if config.dry_run:
        merging.close()
        plan = f"{existing} are there, {merging.duplicates} are left out"
        facts = {"path": config.out, "number": number, "done": existing, "duplicates": merging.duplicates}
        return print_end(config, facts, config.out, f"{config.out}: would have {count_noun(number, 'sample')}, {plan}")
    with Interruption(config.quiet) as interruption, ImageProgress(number - existing, config.quiet) as progress:
        written = write(on_commit=progress.on_commit, is_stopping=interruption.is_stopping)
    merging.close()
    done = existing + written
    if done < number:
        print_unfinished(done, number, command.text)
    else:
        more = f", {merging.duplicates} left out as their images were there before" if merging.duplicates else ""
        more += "" if written else ", nothing to do"
        samples = count_noun(len(open_run(config.out)), "sample")
        print_lines(config, f"{config.out}: complete with {samples}{more}")
    facts = {"number": number, "done": done, "made": written, "duplicates": merging.duplicates}
    print_result(config, {"path": config.out, **facts, "complete": done == number}, config.out)
    return interruption.exit_code


if __name__ == "__main__":
    sys.exit(main())
