"""What plans there are, why some would not be used, and their deletion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export.manifest import NAME, Manifest
from datasetdm_fast.export.tensorrt import flavours, plans
from datasetdm_fast.export.tensorrt.plans import SUFFIX, Entry, Facts, PlanFolder


def plan_rows(out: str) -> list[dict[str, Any]]:
    """Every plan of the folder `out`, or of the cache: what it was built for, and why it would not be used."""
    rows = []
    for opened in plan_folders(out):
        staleness = staleness_of(opened.folder)
        for entry in opened.entries():
            rows.append(_describe(entry) | {"fault": entry.fault or staleness(entry.facts)})
    return rows


def prune(out: str, largest: int, *, is_dry: bool = False) -> list[tuple[Path, str]]:
    """Deletes the plans of the folder `out`, or of the cache, that would not be used; see plans.prune."""
    folders = [(opened, staleness_of(opened.folder)) for opened in plan_folders(out)]
    return plans.prune(folders, largest, is_dry=is_dry)


def plan_folders(out: str) -> Iterator[PlanFolder]:
    """The folder `out`, or every one of the cache, and those in it, as far as they hold plans."""
    if out and not Path(out).is_dir():
        raise Missing(
            f"--out: {out} is not a folder", "Name the folder of the plans, or leave the flag out for the cache."
        )
    for root in [Path(out)] if out else sorted(path for path in plans.cached_plans().glob("*") if path.is_dir()):
        inner = (path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        yield from (PlanFolder(folder) for folder in (root, *sorted(inner)) if any(folder.glob(f"*{SUFFIX}")))


def staleness_of(folder: Path) -> Callable[[Facts], str]:
    """Tells why a plan of the folder is stale: another TensorRT is installed, or its graph was exported again."""
    try:
        manifest = Manifest.read(folder) if (folder / NAME).is_file() else None
    except Refused:
        manifest = None

    def explain(facts: Facts) -> str:
        try:
            installed = flavours.find_flavour(facts["flavour"], "--list")
        except Missing:
            installed = None  # built here for another machine
        if installed and (installed.version, installed.cuda) != (facts["version"], facts["cuda"]):
            return f"is stale: built by version {facts['version']}, installed is {installed.version}"
        if manifest and (facts["source"] != manifest.source or facts["stage"] not in manifest.stages):
            return f"is stale: {folder / NAME} describes other graphs"
        return ""

    return explain


def _describe(entry: Entry) -> dict[str, Any]:
    facts = entry.facts
    row: dict[str, Any] = {"path": str(entry.path), "bytes": entry.size}
    if not facts:
        return row
    # the images of each optimisation profile; a CFG batch is twice as long and never the shortest input
    batches = [min(shape[0] for shape in profile.values()) for profile in facts["profiles"]]
    about = {"stage": facts["stage"], "precision": facts["precision"], "batches": batches}
    about |= {"flavour": f"{flavours.TITLES[facts['flavour']]} {facts['version']}", "cuda": facts["cuda"]}
    return row | about | {"capabilities": facts["capabilities"] or ["portable"], "gpu": facts["gpu"], **entry.notes}


def describe_row(row: dict[str, Any]) -> str:
    """A plan as one line."""
    head, fault = f"{row['path']}  {row['bytes'] / 1e6:.1f} MB", row["fault"].removeprefix(f"{row['path']}: ")
    if "stage" not in row:
        return f"{head}  not usable: {fault}"
    batches, capabilities = ",".join(map(str, row["batches"])), ",".join(row["capabilities"])
    about = f"{row['stage']} {row['precision']}, batch {batches}, {row['flavour']} for {capabilities}"
    return f"{head}  {about}" + (f"  not usable: {fault}" if fault else f", {row['layers']} layers")
