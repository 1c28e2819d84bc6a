"""python -m datasetdm_fast.drop RUN ID...: remove samples from a run folder; restore brings them back."""

import sys
from dataclasses import dataclass

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.output import print_end
from datasetdm_fast.errors import Refused
from datasetdm_fast.settings import OutputSettings, setting

EXAMPLES = ("runs/demo 00000003 00000007", 'runs/demo --where "score < 0.4" --dry-run')


@dataclass(frozen=True)
class DropConfig(OutputSettings):
    run: str = setting("", "run folder", metavar="RUN", positional=True, required=True)
    ids: tuple[str, ...] = setting((), "ids of samples, such as 00000003", metavar="ID", positional=True)
    file: str = setting("", "file with one id per line", metavar="FILE")
    where: str = setting(
        "", "drop the samples for which this holds, such as 'score<0.4 or duplicate==1'", metavar="CONDITION"
    )


@command_with(DropConfig, EXAMPLES)
def main(config: DropConfig, command: CommandLine) -> int:
    for name in ("file", "where"):
        if name in command.provided and not getattr(config, name).strip():
            raise Refused(f"--{name}: no value was given", "Give a value, or drop the flag.")
    if not (config.ids or config.file or config.where):
        raise Refused(f"{command.prog}: names no sample", "Give ids, --file FILE or --where CONDITION.")
    from datasetdm_fast.runs.curation import dropping, filtering
    from datasetdm_fast.runs.run_folder.document import EXPORTS
    from datasetdm_fast.runs.run_folder.reader import open_run

    run = open_run(config.run)
    requested = dropping.read_ids(config.ids, config.file)
    requested |= set(filtering.select(run, config.where)) if config.where else set()
    total, doubtful = len(run), requested & dropping.find_doubtful(run)
    ids = [f"{index:08d}" for index in dropping.drop(run, requested, is_dry=config.dry_run)]
    earlier = len(requested) - len(ids) - len(doubtful)
    verb = "would be" if config.dry_run else "is" if len(ids) == 1 else "are"
    line = f"{config.run}: {len(ids) or 'none'} of {total} samples {verb} dropped"
    line += f"; {earlier} {'was' if earlier == 1 else 'were'} dropped before" if earlier else ""
    line += dropping.describe_doubtful(len(doubtful))
    lines = [line]
    exports = run.path / EXPORTS
    if not config.dry_run and ids and exports.is_dir() and any(exports.iterdir()):
        lines.append(f"{exports}: was made before and is as it was; delete it and convert again")
    result = "\n".join(ids) if config.dry_run else config.run
    return print_end(config, {"path": config.run, "dropped": ids, "left": total - len(ids)}, result, *lines)


if __name__ == "__main__":
    sys.exit(main())
