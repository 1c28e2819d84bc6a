"""Whether every file of an export is what was written."""

from collections.abc import Iterator
from pathlib import Path

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.exporting.target import DOCUMENT, SUMS, WORK, read_export, stated
from datasetdm_fast.runs.run_folder.audit import Finding, Report
from datasetdm_fast.runs.run_folder.document import EXPORTS

REMEDY = "Delete the export and run the line of convert once more: it gives the same bytes."


def exports_of(run: Path) -> Iterator[Path]:
    """The exports that lie in a run folder."""
    root = run / EXPORTS
    yield from (path.parent for path in sorted([*root.glob(DOCUMENT), *root.glob(f"*/{DOCUMENT}")]))


def audit_export(folder: Path) -> Report:
    """The report on an export; nothing in it is changed."""
    findings: list[Finding] = []
    try:
        told = read_export(folder)
    except (Refused, Missing) as error:
        findings.append(Finding(DOCUMENT, error.cause.removeprefix(f"{folder / DOCUMENT}: "), REMEDY))
        return Report(str(folder), 0, 0, 0, 0, 0, findings)
    samples = told["samples"]
    if not told["complete"]:
        return Report(str(folder), samples, 0, 0, 0, 0, findings)
    if storage.sha256_of(folder / SUMS) != told.get("sums"):
        findings.append(Finding(SUMS, "its bytes are not those that were written", REMEDY))
        return Report(str(folder), samples, samples, 0, 0, 0, findings)
    names: set[str] = set()
    total = 0
    try:
        for name, digest in stated(folder):
            names.add(name)
            found = storage.sha256_of(folder / name)
            if found != digest:
                what = "its bytes are not those that were written" if found else "is not there"
                findings.append(Finding(name, what, REMEDY))
            else:
                total += (folder / name).stat().st_size
    except Refused as error:
        findings.append(Finding(SUMS, error.cause.removeprefix(f"{folder / SUMS}: "), REMEDY))
        return Report(str(folder), samples, samples, 0, 0, 0, findings)
    findings += _strangers(folder, names | {DOCUMENT, SUMS})
    return Report(str(folder), samples, samples, 0, len(names), total, findings)


def _strangers(folder: Path, known: set[str]) -> Iterator[Finding]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in known and not name.startswith(f"{WORK}/"):
            yield Finding(name, "no line of SHA256SUMS names this file", "Delete it, or move it out of the export.")
