"""Index files and page of a run folder, made anew out of one reading of its ledger."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.runs import gallery
from datasetdm_fast.runs.run_folder.indexes import writers
from datasetdm_fast.runs.run_folder.ledger import DONE, Ledger
from datasetdm_fast.runs.run_folder.seal import ELSEWHERE


def rebuild(folder: Path, document: Mapping[str, Any], ledger: Ledger, *, is_in_progress: bool = False) -> None:
    """Writes every index file and the page; that of a run in progress looks for later ones."""
    files = {folder / name: writer(document, ledger) for name, writer in writers(document).items()}
    has_samples = not (folder / ELSEWHERE).exists()
    page = gallery.PageWriter(folder, document, ledger, has_samples=has_samples, is_in_progress=is_in_progress)
    with page, storage.Publication(files) as publication:
        for path, file in files.items():
            publication.write(path, file.begin())
        for rows in gallery.thousands(ledger):
            there = [row for row in rows if row.status == DONE]
            for path, file in files.items():
                publication.write(path, file.add(there))
            page.add(rows)
        for path, file in files.items():
            publication.write(path, file.end())
        page.end()
