"""Audits a run folder with the exports in it, an export, or a run in an object store."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from datasetdm_fast.errors import Refused, quote
from datasetdm_fast.runs.exporting.export_folder import DOCUMENT as EXPORT
from datasetdm_fast.runs.exporting.export_folder import audit_export, exports_of
from datasetdm_fast.runs.run_folder.audit import Report, audit
from datasetdm_fast.runs.run_folder.document import DOCUMENT
from datasetdm_fast.runs.run_folder.object_store import StoreCopy, copy_of
from datasetdm_fast.runs.run_folder.shard_audit import audit_shards, find_sharded


def audit_place(place: str, threads: int, on_progress: Callable[[int, int], None]) -> Report:
    """The report on what lies at a path or URL; `on_progress` gets the number of checked samples and that of all."""
    if find_sharded(place) is not None:
        return audit_shards(place, threads, on_progress)
    copies = copy_of(place)
    folder = Path(place) if copies is None else copies.store.disk
    if folder is None:
        assert copies is not None
        return _audit_store(place, copies, threads, on_progress)
    if (folder / EXPORT).exists() and not (folder / DOCUMENT).exists():
        return audit_export(folder)
    report = audit(folder, threads=threads, on_progress=on_progress)
    for export in exports_of(folder):
        name = export.relative_to(folder)
        findings = audit_export(export).findings
        report.findings.extend(replace(finding, place=f"{name}/{finding.place}") for finding in findings)
    return report


def _audit_store(place: str, copies: StoreCopy, threads: int, on_progress: Callable[[int, int], None]) -> Report:
    """The report on a temporary copy."""
    folder = copies.fetch_all()
    if not folder.is_dir():  # no file was fetched
        raise Refused(f"{place}: it is empty, so it is not a run", "Check the address.")
    try:
        report = audit_place(str(folder), threads, on_progress)
    except Refused as stop:
        raise Refused(stop.cause.replace(str(folder), place), stop.remedy) from stop
    remedy = f"Copy the run with: python -m datasetdm_fast.gallery {quote(place)} --out COPY; then audit COPY."
    return replace(report, path=place, findings=[replace(finding, remedy=remedy) for finding in report.findings])
