"""The page and the index files of a run at any time: finished, stopped or in progress; of one in shards, each file of
the page is made when a browser asks for it.
"""

import shutil
import tempfile
import threading
import weakref
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.gallery.page import FIXED_FILES, RunFacts, fetch_or_draw, finish_run, lock_page, write_indexes
from datasetdm_fast.runs.gallery.review import Review
from datasetdm_fast.runs.gallery.server import ServedRun
from datasetdm_fast.runs.run_folder import folder as run_folder
from datasetdm_fast.runs.run_folder.audit import find_sharded
from datasetdm_fast.runs.run_folder.document import LEDGER, LOCK, quarantines, require_document, without_ledger
from datasetdm_fast.runs.run_folder.folder import RunFolder
from datasetdm_fast.runs.run_folder.ledger import DOUBTFUL, Ledger
from datasetdm_fast.runs.run_folder.reader import Run
from datasetdm_fast.runs.run_folder.selections import read_filter
from datasetdm_fast.runs.run_folder.shard_places import ShardFolder, folder_of, shard_place
from datasetdm_fast.runs.run_folder.shards import ShardLedger


class ShardPage:
    """The page of a run, whose files come to lie in a temporary folder."""

    def __init__(self, run: Run, ledger: ShardLedger):
        self._run, self._ledger, self._making = run, ledger, threading.Lock()
        place = Path(tempfile.mkdtemp(prefix="datasetdm-"))
        weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
        self.folder = place / run.path.resolve().name
        self._pages = Counter(row // run_folder.PAGE_SAMPLES for row in ledger.indices())
        self._facts = RunFacts(run.document, ledger)
        for word in run.document["plan"].get("words", ()):
            self._facts.number(word)
        if self._pages:
            self._make_page(min(self._pages))  # whose samples say which figures there are
        facts = self._facts
        facts.pages, facts.missing, facts.excluded = sorted(self._pages.items()), 0, 0
        facts.doubtful = 0 if quarantines(self._run.document["config"]) else self._ledger.count(DOUBTFUL)
        facts.named, facts.shown = Counter(), Counter()  # the page counts classes itself, once it has all samples
        whole = facts.whole(has_sheets=False, is_in_progress=not self._run.is_complete)
        start = {
            **FIXED_FILES,
            run_folder.RUN_SCRIPT: run_folder.script("run", 0, whole | {"command": ""}),
            run_folder.LEFT_OUT_SCRIPT: run_folder.left_out_script(read_filter(self._run.path)),
        }
        storage.publish({self.folder / name: content for name, content in start.items()})

    @property
    def samples(self) -> int:
        """How many it shows."""
        return self._pages.total()

    def _make_page(self, number: int) -> None:
        """The index of a thousand samples; in a store without what only their records have, each a request."""
        parts = ("files", "labels") if isinstance(self._ledger.place, ShardFolder) else ("files",)
        rows = list(self._ledger.rows_of(self._indices(number, run_folder.PAGE_SAMPLES), parts))
        with self._making:
            content = run_folder.script("page", number, self._facts.index(rows))
        storage.publish({self.folder / run_folder.PAGE_NAME.format(number): content})

    def _make_details(self, number: int) -> None:
        rows = list(self._ledger.rows_of(self._indices(number, run_folder.SHEET_SAMPLES)))
        for row in rows:
            row.tracings.update(run_folder.trace_labels(row.labels))
        content = run_folder.script("details", number, self._facts.details(rows))
        storage.publish({self.folder / run_folder.DETAILS_NAME.format(number): content})

    def _indices(self, number: int, count: int) -> list[int]:
        """The samples of a page or a file of details."""
        return [index for index in range(number * count, (number + 1) * count) if self._ledger.row(index, parts=())]

    def fetch(self, name: str) -> Path | None:
        """A file of the page or of a sample, None where there is none of that name."""
        folder, _, file = name.rpartition("/")
        stem = file.partition(".")[0]
        if not (stem.isascii() and stem.isdecimal() and len(stem) < 16):
            return None
        if name == run_folder.PAGE_NAME.format(int(stem)) and int(stem) in self._pages:
            self._make_page(int(stem))
        elif name == run_folder.DETAILS_NAME.format(int(stem)):
            self._make_details(int(stem))
        else:
            row = self._ledger.row(int(stem), parts=())
            roles = [role for role, (path, _) in row.files.items() if path == name] if row else []
            if row is None or not roles:
                return None
            storage.publish({self.folder / name: self._ledger.read_file(row, roles[0])})
        return self.folder / name


@dataclass(frozen=True)
class ShownRun:
    """A run whose page shows every committed sample."""

    folder: Path  # where the page is
    samples: int  # of the data set
    doubtful: int  # beside it, which the page shows as well
    planned: int
    served: ServedRun  # what a server needs of it


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
        fetch = partial(fetch_or_draw, page.fetch, page.folder)
        name = str(Path(place).resolve()) if isinstance(run.shards.place, ShardFolder) else run.shards.place.name
        served = ServedRun(page.folder.resolve(), name, Review(run.shards.place.name), fetch)
        return ShownRun(page.folder, page.samples, 0, document["plan"]["number"], served)
    folder = folder_of(shard_place(place))
    document = _write_page(folder, is_dry=is_dry)
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        samples, doubtful = ledger.count(), ledger.count(DOUBTFUL)
    return ShownRun(folder, samples, doubtful, document["plan"]["number"], ServedRun.of_folder(folder))


def _write_page(folder: Path, *, is_dry: bool) -> dict[str, Any]:
    """run.json of a run folder that has its page now, unless the run is dry."""
    document = require_document(folder)
    if not (folder / LEDGER).exists():
        if run_folder.is_sealed(folder):
            raise without_ledger(folder, document)
        raise Refused(f"{folder}: no sample is committed yet", "Wait for the first, then run the same command again.")
    with Ledger(folder / LEDGER, read_only=True) as ledger:
        is_shown = is_dry or (run_folder.is_sealed(folder) and run_folder.has_indexes(folder, document, ledger))
    if not is_shown and storage.is_locked(folder / LOCK):
        write_so_far(folder)
    elif not is_shown:
        with RunFolder(folder, document) as opened:
            finish_run(opened)
    return document


def write_so_far(folder: Path) -> None:
    """Writes page and index files of the samples that a run in progress has committed; not where it has just ended."""
    document = require_document(folder)
    with lock_page(folder), run_folder.refusing_rows(folder):
        if run_folder.is_sealed(folder):
            return
        with Ledger(folder / LEDGER, read_only=True) as ledger, ledger.snapshot():
            write_indexes(folder, document, ledger, is_in_progress=True)
