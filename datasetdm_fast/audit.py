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
from datasetdm_fast.runs.run_folder.object_store import copy_of, is_url
from datasetdm_fast.settings import setting

PROG = "python -m datasetdm_fast.audit"
EXAMPLES = ("runs/demo",)
LEDGER_FOLDER = "DIR"  # of a run in an object store, which the URL does not name
SHOWN = 100  # findings on a terminal


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
    report = _audit_place(config.run, config.threads, is_quiet=config.quiet)
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
            "Each line above, or in --json, ends with its remedy.",
        )
    if not config.json:
        missing = report.number - report.done - report.quarantined - report.dropped
        state = "complete" if report.is_complete else f"{missing} still to be made"
        state += f", {report.dropped} dropped" if report.dropped else ""
        counts = f"{report.done} of {report.number} samples ({state}), {report.files} files"
        print(f"{report.path}: whole, {counts}, {report.bytes / 1e6:,.1f} MB read")
    return 0


def _audit_place(place: str, threads: int, *, is_quiet: bool) -> Report:
    """The report on a run folder with the exports in it, on an export, or on a run in an object store."""
    if (copies := copy_of(place)) is not None:
        folder = copies.fetch_all()
        if not folder.is_dir():  # no file was fetched
            raise Refused(f"{place}: it is empty, so it is not a run", "Check the address.")
        report = _audit_place(str(folder), threads, is_quiet=is_quiet)
        # a remedy names the folder that keeps the ledger, not the temporary copy
        keeper = place if not is_url(place) else str(copies.store.disk or LEDGER_FOLDER)
        note = f" ({LEDGER_FOLDER}: the --out of the run, which keeps its ledger)" if keeper == LEDGER_FOLDER else ""
        findings = []
        for finding in report.findings:
            remedy = finding.remedy.replace(quote(folder), quote(keeper)).replace(str(folder), keeper)
            findings.append(replace(finding, remedy=remedy + note * (f"--out {LEDGER_FOLDER}" in remedy)))
        return replace(report, path=place, findings=findings)
    folder = Path(place)
    if (folder / EXPORT).exists() and not (folder / DOCUMENT).exists():
        return audit_export(folder)
    report = _audit_folder(folder, threads, is_quiet)
    for export in exports_of(folder):
        name = export.relative_to(folder)
        findings = audit_export(export).findings
        report.findings.extend(replace(finding, place=f"{name}/{finding.place}") for finding in findings)
    return report


def _audit_folder(folder: Path, threads: int, is_quiet: bool) -> Report:
    from tqdm import tqdm

    with tqdm(unit="sample", file=sys.stderr, disable=not shows_bar(is_quiet)) as bar:

        def show(done: int, number: int) -> None:
            bar.total = number
            bar.update(done - bar.n)

        return audit(folder, threads=threads, on_progress=show)


if __name__ == "__main__":
    sys.exit(main())
