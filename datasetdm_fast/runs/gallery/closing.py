"""Closing a run: its index files and page are written from one reading of the ledger, then the folder is sealed."""

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import locks, storage
from datasetdm_fast.runs.gallery.page import PageWriter, thousands
from datasetdm_fast.runs.run_folder import page_files
from datasetdm_fast.runs.run_folder.document import DROPPED
from datasetdm_fast.runs.run_folder.folder import RunFolder, refusing_rows
from datasetdm_fast.runs.run_folder.indexes import writers
from datasetdm_fast.runs.run_folder.ledger import DONE, Ledger
from datasetdm_fast.runs.run_folder.seal import has_indexes, is_sealed, seal
from datasetdm_fast.runs.run_folder.selections import read_filter

PATIENCE = 900.0  # seconds that a process waits for another that writes the page


def lock_page(folder: Path) -> AbstractContextManager[None]:
    """Holds the page of a run folder for this process, as one process writes it at a time."""
    storage.make_folder(folder / "gallery")
    return locks.hold_lock(folder / page_files.PAGE_LOCK, patience=PATIENCE)


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
        for rows in thousands(ledger):
            done = [row for row in rows if row.status == DONE]
            for path, file in files.items():
                publication.write(path, file.add(done))
            page.add(rows)
        for path, file in files.items():
            publication.write(path, file.end())
        page.end(is_in_progress=is_in_progress)
