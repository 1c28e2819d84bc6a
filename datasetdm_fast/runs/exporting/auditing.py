"""Audits a run folder with the exports in it, an export, or a run in shards."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from datasetdm_fast.runs.exporting.export_folder import DOCUMENT as EXPORT
from datasetdm_fast.runs.exporting.export_folder import audit_export, exports_of
from datasetdm_fast.runs.run_folder.audit import Report, audit
from datasetdm_fast.runs.run_folder.document import DOCUMENT
from datasetdm_fast.runs.run_folder.object_store import is_url
from datasetdm_fast.runs.run_folder.shard_audit import audit_shards, find_sharded
from datasetdm_fast.runs.run_folder.shard_places import folder_of, shard_place


def audit_place(place: str, threads: int, on_progress: Callable[[int, int], None]) -> Report:
    """The report on what lies at a path or URL; `on_progress` gets the number of checked samples and that of all."""
    if find_sharded(place) is not None:
        return audit_shards(place, threads, on_progress)
    folder = folder_of(shard_place(place)) if is_url(place) else Path(place)
    if (folder / EXPORT).exists() and not (folder / DOCUMENT).exists():
        return audit_export(folder)
    report = audit(folder, threads=threads, on_progress=on_progress)
    for export in exports_of(folder):
        name = export.relative_to(folder)
        findings = audit_export(export).findings
        report.findings.extend(replace(finding, place=f"{name}/{finding.place}") for finding in findings)
    return report
