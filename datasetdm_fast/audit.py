"""python -m datasetdm_fast.audit RUN: check that a run folder or an export is complete and undamaged, or name each
damaged file and how to repair it.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.progress import shows_bar
from datasetdm_fast.errors import GateFailed, Refused, quote
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.exporting.export_folder import DOCUMENT as EXPORT
from datasetdm_fast.runs.exporting.export_folder import audit_export, exports_of
from datasetdm_fast.runs.run_folder.audit import Report, audit
from datasetdm_fast.runs.run_folder.document import DOCUMENT
from datasetdm_fast.runs.run_folder.object_store import StoreCopy, copy_of, is_url
from datasetdm_fast.settings import setting

PROG = "python -m datasetdm_fast.audit"
EXAMPLES = ("runs/demo",)
LEDGER_FOLDER = "DIR"  # of a run in an object store, which the URL does not name
SHOWN = 100  # findings told on a terminal


@dataclass(frozen=True)
class AuditConfig:
    run: str = setting("", "run folder, or the folder of an export", metavar="RUN", positional=True)
    threads: int = setting(0, "files checked at once, 0 = all cores", metavar="N")
    json: bool = setting(False, "the report as one JSON object on stdout")
    quiet: bool = setting(False, "show no progress")


@command
def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, AuditConfig, PROG, __doc__, EXAMPLES)
    if not config.run:
        raise Refused(f"{PROG}: RUN is missing", "Name the run folder, for example runs/demo.")
    if config.threads < 0:
        raise Refused(f"--threads {config.threads}: expected a number of 0 or more", "Choose another number.")
    report = _told(config)
    if config.json:
        print(json.dumps({**asdict(report), "complete": report.is_complete}))
    else:
        for finding in report.findings[:SHOWN]:
            print(f"{finding.place}: {finding.what}. {finding.remedy}")
        if len(report.findings) > SHOWN:
            print(f"and {len(report.findings) - SHOWN} more; --json lists them all")
    if report.findings:
        places = len({finding.place for finding in report.findings})
        raise GateFailed(
            f"{report.path}: {count_noun(len(report.findings), 'finding')} in {count_noun(places, 'file')}",
            "Each line above, or in --json, ends with its remedy.",
        )
    if not config.json:
        left = report.number - report.done - report.set_aside - report.dropped
        state = "complete" if report.is_complete else f"{left} still to be made"
        state += f", {report.dropped} dropped" if report.dropped else ""
        print(
            f"{report.path}: whole, {report.done} of {report.number} samples ({state}), {report.files} files, "
            f"{report.bytes / 1e6:,.1f} MB read"
        )
    return 0


def _told(config: AuditConfig) -> Report:
    """The report on a run folder with the exports in it, or on an export."""
    if (copies := copy_of(config.run)) is not None:
        folder = copies.whole()
        if not folder.is_dir():  # no file came
            raise Refused(f"{config.run}: it is empty, so it is not a run", "Check the address.")
        report, here = _told(replace(config, run=str(folder))), _mended_at(config.run, copies)
        findings = report.findings
        for there, mended in ((quote(folder), quote(here)), (str(folder), here)):
            findings = [replace(each, remedy=each.remedy.replace(there, mended)) for each in findings]
        if here == LEDGER_FOLDER:
            findings = [replace(each, remedy=_with_folder_named(each.remedy)) for each in findings]
        return replace(report, path=config.run, findings=findings)
    folder = Path(config.run)
    if (folder / EXPORT).exists() and not (folder / DOCUMENT).exists():
        return audit_export(folder)
    report = _audited(config)
    for export in exports_of(folder):
        place = export.relative_to(folder)
        report.findings.extend(replace(each, place=f"{place}/{each.place}") for each in audit_export(export).findings)
    return report


def _mended_at(run: str, copies: StoreCopy) -> str:
    """The folder that mends a run in an object store when it is given as --out: the one that keeps the ledger."""
    disk = copies.store.disk
    return run if not is_url(run) else str(disk) if disk else LEDGER_FOLDER


def _with_folder_named(remedy: str) -> str:
    """The remedy, which says what the folder is that its command takes."""
    is_said = f"--out {LEDGER_FOLDER}" in remedy
    return remedy + f" ({LEDGER_FOLDER}: the --out of the run, which keeps its ledger)" * is_said


def _audited(config: AuditConfig) -> Report:
    if not shows_bar(config.quiet):
        return audit(Path(config.run), threads=config.threads)
    from tqdm import tqdm

    with tqdm(unit="sample", file=sys.stderr) as bar:

        def seen(done: int, number: int) -> None:
            bar.total = number
            bar.update(done - bar.n)

        return audit(Path(config.run), threads=config.threads, seen=seen)


if __name__ == "__main__":
    sys.exit(main())
