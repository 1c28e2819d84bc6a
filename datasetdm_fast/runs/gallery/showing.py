"""The page and the index files of a run at any time: finished, stopped or in progress."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import locks
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.gallery.closing import finish_run, lock_page, write_indexes
from datasetdm_fast.runs.gallery.server import ServedRun
from datasetdm_fast.runs.gallery.shard_page import ShardPage
from datasetdm_fast.runs.run_folder.document import LEDGER, LOCK, require_document, without_ledger
from datasetdm_fast.runs.run_folder.folder import RunFolder, refusing_rows
from datasetdm_fast.runs.run_folder.ledger import DOUBTFUL, Ledger
from datasetdm_fast.runs.run_folder.reader import Run
from datasetdm_fast.runs.run_folder.seal import has_indexes, is_sealed
from datasetdm_fast.runs.run_folder.shard_audit import find_sharded
from datasetdm_fast.runs.run_folder.shard_places import folder_of, shard_place


@dataclass(frozen=True)
class ShownRun:
    """A run whose page shows every committed sample."""

    folder: Path  # where the page is
    samples: int  # of the data set
    doubtful: int  # beside it, which the page shows as well
    planned: int
    shards: ShardPage | None = None

    def served_run(self) -> ServedRun:
        """What a server needs of the run."""
        return self.shards.served_run() if self.shards else ServedRun.of_folder(self.folder)


def show(place: str | Path, *, is_served: bool = False, is_dry: bool = False) -> ShownRun:
    """A run, by its folder or URL, with its page, which is written anew where it lacks a committed sample. A run in
    progress is not disturbed: its page and index files are written, nothing else; a dry run writes nothing there. The
    page of a run in shards is for a server alone.
    """
    if (document := find_sharded(place)) is not None:
        if not (is_served or is_dry):
            raise Refused(f"{place}: the page of a run in shards is made as it is looked at", "Add --serve.")
        run = Run(place)
        assert run.shards is not None
        page = ShardPage(run, run.shards)
        return ShownRun(page.folder, page.samples, 0, document["plan"]["number"], shards=page)
    folder = folder_of(shard_place(place))
    document = _write_page(folder, is_dry=is_dry)
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        samples, doubtful = ledger.count(), ledger.count(DOUBTFUL)
    return ShownRun(folder, samples, doubtful, document["plan"]["number"])


def _write_page(folder: Path, *, is_dry: bool) -> dict[str, Any]:
    """run.json of a run folder that has its page now, unless the run is dry."""
    document = require_document(folder)
    if not (folder / LEDGER).exists():
        if is_sealed(folder):
            raise without_ledger(folder, document)
        raise Refused(f"{folder}: no sample is committed yet", "Wait for the first, then run the same command again.")
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        is_shown = is_dry or (is_sealed(folder) and has_indexes(folder, document, ledger))
    if not is_shown and locks.is_locked(folder / LOCK):
        write_so_far(folder)
    elif not is_shown:
        with RunFolder(folder, document) as opened:
            finish_run(opened)
    return document


def write_so_far(folder: Path) -> None:
    """Writes page and index files of the samples that a run in progress has committed; not where it has just ended."""
    document = require_document(folder)
    with lock_page(folder), refusing_rows(folder):
        if is_sealed(folder):
            return
        with Ledger(folder / LEDGER, read_only=True) as ledger, ledger.snapshot():
            write_indexes(folder, document, ledger, is_in_progress=True)
