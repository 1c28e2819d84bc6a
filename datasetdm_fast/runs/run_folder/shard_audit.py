"""Audits a run, one in shards in its place and shard by shard, and takes damaged shards out of it."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.runs.run_folder.audit import CHANGED, MISSING, Finding, Report, audit, check_sample, repair
from datasetdm_fast.runs.run_folder.document import is_sharded, shard_size
from datasetdm_fast.runs.run_folder.ledger import DONE
from datasetdm_fast.runs.run_folder.selections import parse_part
from datasetdm_fast.runs.run_folder.shard_places import ShardBucket, ShardPlace, folder_of, is_url, shard_place
from datasetdm_fast.runs.run_folder.shards import (
    RECORD,
    ShardEntry,
    ShardLedger,
    digest_of_shard,
    entry_name,
    index_name,
    list_shards,
    read_stored,
    sample_record,
    tar_name,
)

REMAKE = "Take the shard out with --repair; the line that made the run then makes it again."


def find_sharded(place: str | Path) -> dict[str, Any] | None:
    """run.json of a run in shards, None where the place holds another run, or none."""
    is_nothing = not is_url(place) and not Path(place).is_dir()  # refuses names that no disk takes, too
    try:
        document = None if is_nothing else read_stored(shard_place(place))
    except Refused:  # what is wrong with one on a disk, the audit of a run folder says
        if is_url(place) and isinstance(shard_place(place), ShardBucket):
            raise
        return None
    return document if document and is_sharded(document) else None


def audit_place(place: str, threads: int, on_progress: Callable[[int, int], None], part: str = "") -> Report:
    """The report on a run at a path or URL, or a part of its shards; `on_progress` gets the samples checked and all."""
    if (document := find_sharded(place)) is not None:
        return audit_shards(place, document, threads, on_progress, part)
    if part:
        raise Refused(f"--part {part}: {place} is no run in shards, and is checked as a whole", "Drop --part.")
    folder = folder_of(shard_place(place)) if is_url(place) else Path(place)
    return audit(folder, threads=threads, on_progress=on_progress)


def audit_shards(
    where: str, document: Mapping[str, Any], threads: int, on_progress: Callable[[int, int], None], part: str
) -> Report:
    """The report on a run in shards, finished or not; nothing in it is changed. Of a part, on every n-th shard."""
    place, (k, n) = shard_place(where), parse_part(part or "1/1")
    number, size = document["plan"]["number"], shard_size(document["config"])

    def range_of(shard: int) -> range:
        return range(shard * size, max(min((shard + 1) * size, number), shard * size + 1))

    counts = {shard: len(range_of(shard)) for shard in range(k - 1, -(-number // size), n)}  # of samples
    shards, findings, damaged = [shard for shard in list_shards(place) if shard % n == k - 1], [], []
    done = checked = files = total = 0
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        for shard, (entry, faults) in zip(shards, pool.map(partial(_audit_shard, place, document), shards)):
            findings += faults
            damaged += range_of(shard) if faults else []
            if entry is not None:
                counts[shard] = entry.stop - entry.first
                done, checked = done + len(entry.indices), checked + counts[shard]
                files, total = files + 2, total + sum(file.size for file in entry.files.values())
            on_progress(checked, number // n)
    number = sum(counts.values()) if part else number
    return Report(where, number, done, checked - done, files, total, findings, damaged=tuple(damaged), part=part)


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
        name = entry_name(shard)
        return None, [Finding(name, error.cause.removeprefix(f"{place.name}/").removeprefix(f"{name}: "), REMAKE)]
    return entry, findings


def repair_place(report: Report) -> None:
    """Takes damaged samples, or their shards, out of a run, so that the line that made it makes them again."""
    if (document := find_sharded(report.path)) is None:
        return repair(report)
    place = shard_place(report.path)
    for shard in sorted({index // shard_size(document["config"]) for index in report.damaged}):
        place.remove(entry_name(shard))
