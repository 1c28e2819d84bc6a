"""Audits a run, one in shards in its place and shard by shard, and takes damaged shards out of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.run_folder.audit import CHANGED, MISSING, Finding, Report, audit, check_sample
from datasetdm_fast.runs.run_folder.ledger import DONE
from datasetdm_fast.runs.run_folder.object_store import is_url
from datasetdm_fast.runs.run_folder.shard_places import ShardPlace, folder_of, shard_place
from datasetdm_fast.runs.run_folder.shards import (
    RECORD,
    ShardEntry,
    ShardLedger,
    digest_of_shard,
    entry_name,
    index_name,
    is_sharded,
    list_shards,
    read_stored,
    sample_record,
    shard_size,
    tar_name,
)

REMAKE = "Take the shard out with --repair; the line that made the run then makes it again."


def find_sharded(place: str | Path) -> dict[str, Any] | None:
    """run.json of a run in shards, None where the place holds another run, or none."""
    is_nothing = not is_url(place) and not Path(place).is_dir()  # refuses names that no disk takes, too
    try:
        document = None if is_nothing else read_stored(shard_place(place))
    except Refused:  # what is wrong with it, the audit of a run folder says
        return None
    return document if document and is_sharded(document) else None


def audit_place(place: str, threads: int, on_progress: Callable[[int, int], None]) -> Report:
    """The report on a run at a path or URL; `on_progress` gets the number of checked samples and that of all."""
    if find_sharded(place) is not None:
        return audit_shards(place, threads, on_progress)
    folder = folder_of(shard_place(place)) if is_url(place) else Path(place)
    return audit(folder, threads=threads, on_progress=on_progress)


def audit_shards(where: str, threads: int, on_progress: Callable[[int, int], None]) -> Report:
    """The report on a run in shards, finished or not; nothing in it is changed."""
    place, document = shard_place(where), find_sharded(where)
    assert document is not None
    number, size = document["plan"]["number"], shard_size(document["config"])
    shards, findings, damaged = list_shards(place), [], []
    done = quarantined = files = total = 0
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        for shard, (entry, faults) in zip(shards, pool.map(partial(_audit_shard, place, document), shards)):
            findings += faults
            first, stop = shard * size, min((shard + 1) * size, number)
            damaged += range(first, max(stop, first + 1)) if faults else []
            if entry is not None:
                done, quarantined = (
                    done + len(entry.indices),
                    quarantined + entry.stop - entry.first - len(entry.indices),
                )
                files, total = files + 2, total + sum(file.size for file in entry.files.values())
            on_progress(done + quarantined, number)
    return Report(where, number, done, quarantined, files, total, findings, damaged=tuple(damaged))


def _audit_shard(place: ShardPlace, document: Mapping[str, Any], shard: int) -> tuple[ShardEntry | None, list[Finding]]:
    """The entry of a shard, None where it is damaged, and what is not as it was written."""
    number, size = document["plan"]["number"], shard_size(document["config"])
    try:
        ledger = ShardLedger(place, size, [shard])
        entry, (source, _) = ledger.entries[shard], ledger.source_of(shard)
        if entry.source:  # the last shards of its runs leave gaps
            document = {**document, "plan": document["plan"] | {"number": entry.stop}}
        elif entry.stop != min((shard + 1) * size, number):
            raise Refused(f"{entry_name(shard)}: it ends with sample {entry.stop - 1}", REMAKE)
        for name, written in entry.files.items():
            if (current := digest_of_shard(source, name)) != written:
                named = name if entry.source is None else f"{source.name}/{name}"
                return entry, [Finding(named, CHANGED if current else MISSING, REMAKE)]
        rows = ledger.index_of(shard).rows
        if list(rows) != list(range(entry.first, entry.stop)):
            raise Refused(f"{index_name(shard)}: its samples are not those of the manifest", REMAKE)
        findings = []
        for row in ledger.rows(DONE):
            faults = check_sample(Path(place.name), document, row, ledger.read_file).faults
            if sample_record(row, ledger.stored_id(row)) != ledger.read_file(row, RECORD):
                faults.append(
                    Finding(tar_name(shard), f"the record of {row.request.id} is not that of its row", REMAKE)
                )
            findings += faults
        ledger.close()
    except (Refused, Missing) as error:
        return None, [Finding(entry_name(shard), error.cause.removeprefix(f"{place.name}/"), REMAKE)]
    return entry, findings


def repair_shards(report: Report) -> None:
    """Takes the shards of damaged samples out of a run, so that the line that made it makes them again."""
    place, document = shard_place(report.path), find_sharded(report.path)
    assert document is not None
    for shard in sorted({index // shard_size(document["config"]) for index in report.damaged}):
        place.remove(entry_name(shard))
