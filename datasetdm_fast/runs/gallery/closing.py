"""Writes the page of a run, the sheets and pictures that it shows, and the index files, all from one reading of the
ledger; then the folder is sealed.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.runs.gallery import sheets
from datasetdm_fast.runs.gallery.facts import RunFacts
from datasetdm_fast.runs.run_folder import page_files
from datasetdm_fast.runs.run_folder.document import DROPPED, pretty
from datasetdm_fast.runs.run_folder.folder import RunFolder, refusing_rows
from datasetdm_fast.runs.run_folder.indexes import writers
from datasetdm_fast.runs.run_folder.ledger import DONE, DOUBTFUL, PARTS, Ledger, Row
from datasetdm_fast.runs.run_folder.seal import has_indexes, is_sealed, seal
from datasetdm_fast.runs.run_folder.selections import read_filter

FIXED_FILES = {f"gallery/{name}": Path(__file__).with_name(name).read_bytes() for name in page_files.FIXED}
PATIENCE = 900.0  # seconds that a process waits for another that writes the page


def lock_page(folder: Path) -> AbstractContextManager[None]:
    """Holds the page of a run folder for this process, as one process writes it at a time."""
    storage.make_folder(folder / "gallery")
    return storage.hold_lock(folder / page_files.PAGE_LOCK, patience=PATIENCE)


def finish_run(run: RunFolder) -> None:
    """Writes index files and page, unless they show the ledger's rows already, and seals the folder."""
    with lock_page(run.path):
        if not has_indexes(run.path, run.document, run.ledger):
            run.unseal()
            if (run.path / DROPPED).is_dir():
                run.remove_leftovers()
            with refusing_rows(run.path):
                write_indexes(run.path, run.document, run.ledger)
            shutil.rmtree(run.path / "gallery/thumbnails", ignore_errors=True)  # of runs that an earlier version began,
            storage.remove(run.path / "statistics.png")  # and so is this
            run.ledger.note("indexed", "yes")
        elif not is_sealed(run.path):  # a filter may have been killed before it marked the page
            page_files.mark_left_out(run.path, read_filter(run.path))
        if not is_sealed(run.path) and run.ledger.settle():
            seal(run.path, run.document)


def write_indexes(folder: Path, document: Mapping[str, Any], ledger: Ledger, *, is_in_progress: bool = False) -> None:
    """Writes every index file and the page; that of a run in progress looks for later ones."""
    files = {folder / name: writer(document, ledger) for name, writer in writers(document).items()}
    page = PageWriter(folder, document, ledger)
    with storage.Publication(files) as publication:
        for path, file in files.items():
            publication.write(path, file.begin())
        shown = ledger.rows(DONE, DOUBTFUL, parts=(*PARTS, "tracings"))
        for number, group in groupby(shown, lambda row: row.request.index // page_files.PAGE_SAMPLES):
            rows = list(group)
            done = [row for row in rows if row.status == DONE]
            for path, file in files.items():
                publication.write(path, file.add(done))
            page.add(number, rows)
        for path, file in files.items():
            publication.write(path, file.end())
        page.end(is_in_progress=is_in_progress)


class PageWriter:
    """Writes the page of a run; it gets the rows of the data set and the doubtful ones by thousands, then `end`."""

    def __init__(self, folder: Path, document: Mapping[str, Any], ledger: Ledger):
        self._folder, self._document, self._ledger = folder, document, ledger
        self._facts = RunFacts(document, ledger)
        self._shown_before = sheets.read_shown(folder)
        self._shown: dict[str, str] = {}

    def add(self, number: int, rows: Sequence[Row]) -> None:
        """Writes what the page reads of the samples of the thousand of this number, all of these."""
        self._facts.pages.append((number, len(rows)))
        contents = {page_files.PAGE_NAME.format(number): page_files.script("page", number, self._facts.index(rows))}
        by_sheet = groupby(rows, lambda row: row.request.index // page_files.SHEET_SAMPLES)
        groups = {place: list(group) for place, group in by_sheet}
        for place, group in groups.items():
            details = page_files.script("details", place, self._facts.details(group))
            contents[page_files.DETAILS_NAME.format(place)] = details
        storage.publish({self._folder / name: content for name, content in contents.items()})
        for role in page_files.picture_roles(self._document):
            sheets.draw_missing(self._folder, rows, role)
        self._shown |= sheets.draw_sheets(self._folder, groups, self._shown_before)

    def end(self, *, is_in_progress: bool = False) -> None:
        """Writes the page itself, once all rows were added, and removes files of samples that are no longer shown."""
        expected = page_files.expected_files(self._document, self._ledger)
        for name in set(page_files.existing_files(self._folder, self._document)) - expected:
            storage.remove(self._folder / name)
        run = self._facts.whole(has_sheets=True, is_in_progress=is_in_progress)
        contents = {
            page_files.SHEETS: pretty(self._shown),
            page_files.RUN: page_files.script("run", 0, run),
            page_files.LEFT_OUT: page_files.left_out_script(read_filter(self._folder)),
            **FIXED_FILES,
        }
        storage.publish({self._folder / name: content for name, content in contents.items()})
