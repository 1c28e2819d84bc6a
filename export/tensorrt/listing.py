"""What plans there are, why some would not be used, and their deletion."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export.manifest import NAME, Manifest
from datasetdm_fast.export.tensorrt import flavours, plans
from datasetdm_fast.export.tensorrt.plans import SUFFIX, SUFFIXES, Facts, PlanFile, PlanFolder, sibling


def list_plans(out: str) -> list[dict[str, Any]]:
    """Every plan of the folder `out`, or of the cache: what it was built for, and why it would not be used."""
    rows = []
    for opened in plan_folders(out):
        staleness = staleness_of(opened.folder)
        for path in opened.plan_files():
            if path.suffix != SUFFIX:
                continue
            row: dict[str, Any] = {"path": str(path), "bytes": path.lstat().st_size}
            try:
                plan = plans.read_plan(path)
                rows.append({**row, **_describe(plan), "fault": staleness(plan.facts)})
            except (Missing, Refused) as refusal:
                rows.append({**row, "fault": refusal.cause})
    return rows


def prune_plans(out: str, *, is_dry: bool = False) -> list[dict[str, Any]]:
    """Deletes the plans of the folder `out`, or of the cache, that would not be used, and files that belong to no plan;
    a dry run deletes nothing.
    """
    rows = [row for row in list_plans(out) if row["fault"]]
    for opened in plan_folders(out):
        strays = (path for path in opened.plan_files() if not os.path.lexists(sibling(path, SUFFIX)))
        rows += [{"path": str(path), "bytes": path.stat().st_size, "fault": "belongs to no plan"} for path in strays]
    for row in () if is_dry else rows:
        for suffix in SUFFIXES:
            with storage.refusing(row["path"]):
                sibling(Path(row["path"]), suffix).unlink(missing_ok=True)
    return rows


def plan_folders(out: str) -> Iterator[PlanFolder]:
    """The folder `out`, or every one of the cache, and those in it, as far as they hold plans."""
    if out and not Path(out).is_dir():
        raise Missing(
            f"--out: {out} is not a folder", "Name the folder of the plans, or leave the flag out for the cache."
        )
    for root in [Path(out)] if out else sorted(path for path in plans.cached_plans().glob("*") if path.is_dir()):
        inner = (path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        yield from (PlanFolder(folder) for folder in (root, *sorted(inner)) if any(PlanFolder(folder).plan_files()))


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


def _describe(plan: PlanFile) -> dict[str, Any]:
    facts = {name: plan.facts[name] for name in ("stage", "precision", "batch", "cuda", "gpu")}
    facts["flavour"] = f"{flavours.TITLES[plan.facts['flavour']]} {plan.facts['version']}"
    return {**facts, "capabilities": plan.facts["capabilities"] or ["portable"], **plan.notes}


def describe_row(row: dict[str, Any]) -> str:
    """A plan as one line."""
    head, fault = f"{row['path']}  {row['bytes'] / 1e6:.1f} MB", row["fault"].removeprefix(f"{row['path']}: ")
    if "stage" not in row:
        return f"{head}  not usable: {fault}"
    gpus = ",".join(row["capabilities"])
    about = f"{row['stage']} {row['precision']}, batch {row['batch']}, {row['flavour']} for {gpus}"
    return f"{head}  {about}" + (f"  not usable: {fault}" if fault else f", {row['layers']} layers")
