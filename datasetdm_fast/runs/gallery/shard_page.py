"""The page of a run in shards, each file of which is made when a browser asks for it."""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections import Counter
from functools import partial
from pathlib import Path

from datasetdm_fast.disk import storage
from datasetdm_fast.runs.gallery.closing import FIXED_FILES
from datasetdm_fast.runs.gallery.facts import RunFacts
from datasetdm_fast.runs.gallery.review import Review
from datasetdm_fast.runs.gallery.server import ServedRun
from datasetdm_fast.runs.gallery.sheets import fetch_or_draw
from datasetdm_fast.runs.run_folder import page_files
from datasetdm_fast.runs.run_folder.document import quarantines
from datasetdm_fast.runs.run_folder.folder import trace_labels
from datasetdm_fast.runs.run_folder.page_files import (
    DETAILS_NAME,
    PAGE_NAME,
    PAGE_SAMPLES,
    SHEET_SAMPLES,
)
from datasetdm_fast.runs.run_folder.reader import Run
from datasetdm_fast.runs.run_folder.selections import read_filter
from datasetdm_fast.runs.run_folder.shard_places import ShardFolder
from datasetdm_fast.runs.run_folder.shards import ShardLedger


class ShardPage:
    """The page of a run, whose files come to lie in a temporary folder."""

    def __init__(self, run: Run, ledger: ShardLedger):
        self._run, self._ledger, self._making = run, ledger, threading.Lock()
        place = Path(tempfile.mkdtemp(prefix="datasetdm-"))
        weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
        self.folder = place / run.path.resolve().name
        self._pages = Counter(row // PAGE_SAMPLES for row in ledger.indices())
        self._facts = RunFacts(run.document, ledger)
        for word in run.document["plan"].get("words", ()):
            self._facts.number(word)
        if self._pages:
            self._make_page(min(self._pages))  # whose samples say which figures there are
        self._publish_start()

    @property
    def samples(self) -> int:
        """How many it shows."""
        return self._pages.total()

    def _publish_start(self) -> None:
        """The page itself, with the counts of the manifest."""
        facts, entries = self._facts, self._ledger.entries.values()
        facts.pages, facts.missing, facts.excluded = sorted(self._pages.items()), 0, 0
        facts.doubtful = 0 if quarantines(self._run.document["config"]) else self._ledger.count_doubtful()
        facts.named = Counter()
        facts.shown = sum((Counter(entry.classes) for entry in entries), Counter())
        whole = facts.whole(has_sheets=False, is_in_progress=not self._run.is_complete)
        start = {
            **FIXED_FILES,
            page_files.RUN: page_files.script("run", 0, whole | {"command": ""}),
            page_files.LEFT_OUT: page_files.left_out_script(read_filter(self._run.path)),
        }
        storage.publish({self.folder / name: content for name, content in start.items()})

    def _make_page(self, number: int) -> None:
        """The index of a thousand samples; in a store without what only their records have, each a request."""
        parts = ("files", "labels") if isinstance(self._ledger.place, ShardFolder) else ("files",)
        rows = list(self._ledger.rows_of(self._indices(number, PAGE_SAMPLES), parts))
        with self._making:
            content = page_files.script("page", number, self._facts.index(rows))
        storage.publish({self.folder / PAGE_NAME.format(number): content})

    def _make_details(self, number: int) -> None:
        rows = list(self._ledger.rows_of(self._indices(number, SHEET_SAMPLES)))
        for row in rows:
            row.tracings.update(trace_labels(row.labels))
        content = page_files.script("details", number, self._facts.details(rows))
        storage.publish({self.folder / DETAILS_NAME.format(number): content})

    def _indices(self, number: int, count: int) -> list[int]:
        """The samples of a page or a file of details."""
        return [index for index in range(number * count, (number + 1) * count) if self._ledger.row(index, parts=())]

    def fetch(self, name: str) -> Path | None:
        """A file of the page or of a sample, None where there is none of that name."""
        folder, _, file = name.rpartition("/")
        stem = file.partition(".")[0]
        if not (stem.isascii() and stem.isdecimal() and len(stem) < 16):
            return None
        if name == PAGE_NAME.format(int(stem)) and int(stem) in self._pages:
            self._make_page(int(stem))
        elif name == DETAILS_NAME.format(int(stem)):
            self._make_details(int(stem))
        else:
            row = self._ledger.row(int(stem), parts=())
            roles = [role for role, (path, _) in row.files.items() if path == name] if row else []
            if row is None or not roles:
                return None
            storage.publish({self.folder / name: self._ledger.read_file(row, roles[0])})
        return self.folder / name

    def served_run(self) -> ServedRun:
        """What a server needs of the run."""
        review = Review(self._ledger.place.name)
        return ServedRun(self.folder.resolve(), "", review, partial(fetch_or_draw, self.fetch, self.folder))
