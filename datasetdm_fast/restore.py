"""python -m datasetdm_fast.restore RUN ID...: bring back samples that were dropped from a run folder."""

import sys
from dataclasses import dataclass

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.output import print_end
from datasetdm_fast.errors import Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.settings import OutputSettings, setting

EXAMPLES = ("runs/demo 00000003", "runs/demo --all")


@dataclass(frozen=True)
class RestoreConfig(OutputSettings):
    run: str = setting("", "run folder", metavar="RUN", positional=True, required=True)
    ids: tuple[str, ...] = setting((), "ids of samples, such as 00000003", metavar="ID", positional=True)
    file: str = setting("", "file with one id per line", metavar="FILE")
    all: bool = setting(False, "bring back all dropped samples")


@command_with(RestoreConfig, EXAMPLES)
def main(config: RestoreConfig, command: CommandLine) -> int:
    if "file" in command.provided and not config.file.strip():
        raise Refused("--file: no file was given", "Give a value, or drop the flag.")
    if bool(config.ids or config.file) == config.all:
        raise Refused(f"{command.prog}: expected either ids or --all", "Give ids, --file FILE or --all.")
    from datasetdm_fast.runs.curation import dropping
    from datasetdm_fast.runs.run_folder.reader import open_run

    run = open_run(config.run)
    requested = None if config.all else dropping.read_ids(config.ids, config.file)
    doubtful = len(dropping.find_doubtful(run) & (requested or set()))
    ids = [f"{index:08d}" for index in dropping.restore(run, requested, is_dry=config.dry_run)]
    line = f"{config.run}: {count_noun(len(ids), 'sample')} {'would be' if config.dry_run else 'brought'} back"
    line += dropping.describe_doubtful(doubtful)
    result = "\n".join(ids) if config.dry_run else config.run
    return print_end(config, {"path": config.run, "restored": ids}, result, line)


if __name__ == "__main__":
    sys.exit(main())
