"""python -m datasetdm_fast.audit RUN: check a run, and say how to repair what is damaged."""

import json
import sys
from dataclasses import asdict, dataclass

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.output import CountProgress
from datasetdm_fast.errors import GateFailed
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.run_folder.audit import audit_place, repair
from datasetdm_fast.settings import setting

EXAMPLES = ("runs/demo",)
SHOWN = 100  # findings on a terminal


@dataclass(frozen=True)
class AuditConfig:
    run: str = setting("", "run folder, or the URL of a run in shards", metavar="RUN", positional=True, required=True)
    part: str = setting("", "check only the k-th of n parts of the shards, so that n machines share it", metavar="K/N")
    threads: int = setting(0, "files checked at once, 0 = all cores", metavar="N", least=0)
    repair: bool = setting(False, "take damaged samples out of the run, so that the line that made it makes them again")
    json: bool = setting(False, "the report as one JSON object on stdout")
    quiet: bool = setting(False, "show no progress")


@command_with(AuditConfig, EXAMPLES)
def main(config: AuditConfig, command: CommandLine) -> int:
    with CountProgress(config.quiet, config.run, 0, "sample") as progress:
        report = audit_place(config.run, config.threads, progress.on_count, config.part)
    if config.repair and report.damaged:
        repair(report)
    if config.json:
        fields = {"set_aside" if name == "quarantined" else name: value for name, value in asdict(report).items()}
        print(json.dumps({**fields, "complete": report.is_complete}))
    else:
        for finding in report.findings[:SHOWN]:
            print(f"{finding.place}: {finding.what}. {finding.remedy}")
        if len(report.findings) > SHOWN:
            print(f"and {len(report.findings) - SHOWN} more; --json lists them all")
    if report.findings:
        places = len({finding.place for finding in report.findings})
        raise GateFailed(
            f"{report.path}: {count_noun(len(report.findings), 'finding')} in {count_noun(places, 'file')}",
            f"{count_noun(len(report.damaged), 'sample')} taken out: run the line that made the run again."
            if config.repair and report.damaged
            else "Each line above, or in --json, ends with its remedy.",
        )
    if not config.json:
        missing = report.number - report.done - report.quarantined - report.dropped
        state = "complete" if report.is_complete else f"{missing} still to be made"
        state += f": --most-tries allows no others for {missing}" if report.is_complete and missing > 0 else ""
        state += f", {report.dropped} dropped" if report.dropped else ""
        path = f"{report.path}, part {report.part}" if report.part else report.path
        counts = f"{report.done} of {report.number} samples ({state}), {count_noun(report.files, 'file')}"
        print(f"{path}: whole, {counts}, {report.bytes / 1e6:,.1f} MB read")
    return 0


if __name__ == "__main__":
    sys.exit(main())
